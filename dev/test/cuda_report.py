#!/usr/bin/env python3
"""What nvcc made of the GPU's kernels, one line each.

    nvcc ... -Xptxas -v -cubin -o KERNELS.cubin 2>PTXAS.txt
    python3 dev/test/cuda_report.py PTXAS.txt [KERNELS.cubin]

regs, spill, stack   registers of a thread, bytes of spills, bytes of its own memory
code                 instructions
loads, stores        of global memory: those of 16 bytes, of all
loop                 instructions for 16 bytes that the loop around them loads from global memory,
                     in the loop for which that is least; without such a loop, of the whole kernel.
                     16 bytes are 8 elements in bf16, 4 in fp32

The last four need the cubin and cuobjdump: of the CUDA Toolkit, in PATH, or named by the variable
CUOBJDUMP. Exit code 1 if a kernel spills.
"""
import os
import re
import shutil
import subprocess
import sys

LOADS, STORES = ("LDG", "LDGSTS"), ("STG", "RED")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def usage(text):
    """{kernel: [registers, bytes of spills, bytes of stack]} of what ptxas -v prints."""
    kernels, name, stack, spill = {}, None, 0, 0
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            name, stack, spill = found[1], 0, 0
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
                                r"spill loads", line):
            stack, spill = int(found[1]), int(found[2]) + int(found[3])
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            kernels[name] = [int(found[1]), spill, stack]
    return kernels


def code(text):
    """{kernel: [(address, instruction)]} of what cuobjdump -sass prints."""
    kernels, name = {}, None
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
            kernels[name] = []
        elif (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", line)) and name:
            kernels[name].append((int(found[1], 16), found[2]))
    return kernels


def opcode(instruction):
    """Its opcode with its modifiers, without its predicate."""
    words = instruction.split()
    return words[1 if words[0].startswith("@") and len(words) > 1 else 0].split(".")


def width(instruction, kinds):
    """The bytes that it moves, if it is of these kinds; otherwise 0."""
    name, *modifiers = opcode(instruction)
    return max((BYTES.get(m, 4) for m in modifiers or [""]), key=lambda b: (b != 4, b)) \
        if name in kinds else 0


def loops(body):
    """The (first, last) places of each loop: a branch back and what it returns to."""
    place = {address: i for i, (address, _) in enumerate(body)}
    found = set()
    for i, (address, instruction) in enumerate(body):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address and int(target[1], 16) in place:
            found.add((place[int(target[1], 16)], i))
    return found


def facts(body):
    """[instructions, "wide/all" loads, the same of stores, instructions for 16 bytes or None]."""
    moved = [[width(instruction, kinds) for _, instruction in body] for kinds in (LOADS, STORES)]
    share = [f"{sum(w == 16 for w in all_)}/{sum(w > 0 for w in all_)}" for all_ in moved]
    cost = [16 * (last - first + 1) / sum(moved[0][first:last + 1]) for first, last in loops(body)
            if sum(moved[0][first:last + 1])]
    if not cost and sum(moved[0]):
        cost = [16 * len(body) / sum(moved[0])]
    return [len(body), *share, round(min(cost)) if cost else None]


def plain(names):
    """Their C++ names, without types of arguments."""
    try:
        told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                              check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        told = names
    return [re.sub(r"\(.*", "", re.sub(r"^void ", "", name)) for name in told]


def disassembly(cubin):
    """What cuobjdump says of it, or None, after one line on standard error."""
    program = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump", path=os.pathsep.join(
        [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"),
                                                  "bin")]))
    try:
        if program:
            return subprocess.run([program, "-sass", cubin], capture_output=True, text=True,
                                  check=True).stdout
        print("no cuobjdump: registers and spills only; CUOBJDUMP=FILE names it", file=sys.stderr)
    except OSError as error:
        print(f"cannot run {program}: {error.strerror}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"{program} fails: {error.stderr.strip()[-200:]}", file=sys.stderr)
    return None


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        print(__doc__)
        return sys.argv[1:] not in (["--help"], ["-h"])
    try:
        with open(sys.argv[1], encoding="utf-8", errors="replace") as file:
            kernels = usage(file.read())
    except OSError as error:
        sys.exit(f"error: cannot read {sys.argv[1]}: {error.strerror}")
    if not kernels:
        sys.exit(f"error: {sys.argv[1]} names no kernel\n  hint: -Xptxas -v prints them")
    text = disassembly(sys.argv[2]) if len(sys.argv) > 2 else None
    bodies = code(text) if text else {}
    print("  regs  spill  stack" + ("   code    loads   stores  loop" if bodies else ""))
    for name, told in zip(kernels, plain(list(kernels))):
        line = "  {:4d} {:6d} {:6d}".format(*kernels[name])
        if bodies:
            count, loads, stores, loop = facts(bodies.get(name, []))
            line += f" {count:6d} {loads:>8} {stores:>8} {'-' if loop is None else loop:>5}"
        print(f"{line}  {told}")
    spilled = sum(k[1] for k in kernels.values())
    print(f"  {len(kernels)} kernels, {spilled} bytes spilled")
    return spilled > 0


if __name__ == "__main__":
    sys.exit(main())
