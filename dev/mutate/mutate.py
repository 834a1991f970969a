#!/usr/bin/env python3
"""Do the tests notice a wrong operator, constant or missing statement? A mutant is drop_path.h,
checkpoint.h or the drop-path part of train_gpt.c or schedule.h with one change. All of them are
compiled into the same programs, each as a copy of its function, and the variable MUTANT selects
one. Tests run on it until one fails.

    make mutate                          all; those caught before are skipped until their file
                                         changes
    dev/mutate/mutate.py --jobs 4        several concurrently
    dev/mutate/mutate.py --seconds 170   stops in time; the next call continues
    dev/mutate/mutate.py --only 17 keep  only these, by number or function, with the tests' output
    dev/mutate/mutate.py --survivors     retries those in dev/mutate/survivors.txt
    dev/mutate/mutate.py --list          the mutants: number, name, place
    dev/mutate/mutate.py --check         only checks that survivors.txt names existing mutants
    dev/mutate/mutate.py --since HEAD~1  converts survivors.txt from the names of that revision

A mutant's name consists of its function, the change, and which of the function's places with that
change it is: "drop_path_ramp: < to <=, 2 of 3". Renaming variables and reflowing lines does not
affect it. If the number of such places changes, so does "of 3", so that a name never silently comes
to mean another mutant; --since then finds the place by the surrounding code.

A mutant is caught if a test fails, a sanitizer stops it, or it takes ten times as long as the
original. Survivors are printed; dev/mutate/survivors.txt gives the reasons why they may survive. A
reason that begins with "The same" means that the mutant computes what the original does: no test
can catch it, and it does not count. Exit code 1 if fewer than 90% of the others in a file are
caught, if a survivor has no reason, or if survivors.txt names a mutant that does not exist or that
a test caught.

Never changed: CHECK and assert, which correct callers never reach; message texts; comments.
"""
import argparse
import collections
import concurrent.futures
import difflib
import fcntl
import filecmp
import glob
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORK = os.path.join(ROOT, "build", "mutate")
TREE = os.path.join(WORK, "tree")                        # the sources with all mutants, and the
                                                         # programs built from them
SURVIVORS = os.path.join(ROOT, "dev", "mutate", "survivors.txt")
LEAST = 90.0                                             # per cent caught
CHOOSE = """extern char *getenv(const char *); extern int atoi(const char *); static int mutant;
__attribute__((constructor)) static void mutant_choose(void) {
    mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;
}
"""
FLAGS = ("-std=c11 -g -w -march=native -fno-math-errno -ffp-contract=fast -fopenmp "
         "-include mutant.h").split()
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all".split()

# Functions that decide which rows run, at what scale, and how their gradients and memory are
# handled; every function of the other files.
FUNCTIONS = {
    "dev/model/schedule.h": "ramp_shape ramp_at".split(),
    "train_gpt.c": """
    residual_forward residual_backward rows_of tokens_of linear_forward linear_backward
    end_is_packed branch_end branch_end_gradient end_forward end_backward
    attention_branch_forward attention_branch_backward mlp_branch_forward mlp_branch_backward
    branch_forward branch_backward block_forward block_backward
    run_forward run_backward model_run model_update""".split(),
    "dev/model/cpu_model.h": "gradient_add saved_per_row saved_bound save".split()}

# Tests that run in a program of dev/mutate/tests.c for that file only, whose GROUP is the index in
# this table; and tests of test_gpt, mostly whole runs, that survivors must also survive.
FILES = {                       # path -> (sanitizers, tests alone, whole runs)
    "dev/model/drop_path.h": (True, "drop_.*", """
        trainer_(survival|replay).* evaluate_(depths|without).* engine_(bounded|evaluates)"""),
    "dev/run/checkpoint.h": (True, "checkpoint_.*", """
        torture_short numbers_(are_in|weights).* trainer_(survival|weights|spares).*
        init_from.* export_.* evaluate_refuses.* interop_sharded.*"""),
    "train_gpt.c": (False, "engine_(?!reference|many|peak|bf16_threads).*", """
        numbers_(selfcheck|forward).* trainer_(drop|survival).* engine_many.* evaluate_without.*
        ranks_equal.*"""),
    "dev/model/schedule.h": (True, "drop_.*", """
        trainer_(survival|replay).*""")}
FILES["dev/model/cpu_model.h"] = FILES["train_gpt.c"]

# Replacements, made where there are spaces around the operator.
OPERATORS = """< <=, < >=, <= <, > >=, > <=, >= >, == !=, != ==, + -, - +, * /, / *, % *, && ||,
    || &&, += -=, -= +=, & |, | &, |= &=, << >>, >> <<"""
OPERATORS = [pair.split() for pair in OPERATORS.split(",")]
NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])")
HEADER = re.compile(r"\b(?:if|for|while|switch)\s*(?=\()")
DECLARATION = re.compile(
    r"(return|goto|case|default|typedef|enum|struct|static|const|CHECK|assert)\b|\w+ \**\w")
ASSIGNMENT = re.compile(r"[\w.\[\]>()*+ -]+? [-+*/%&|^]?=(?!=)")
CALL = re.compile(r"(?:\(void\)\s?)?(?:\w+(?:\.|->))*(\w+)\(.*\)$")


# ---- Making mutants ----

def code_only(text):
    """The text with comments, string and character constants blanked; offsets are preserved."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|^[ '
                         r'\t]*#[^\n]*', re.S | re.M)
    return pattern.sub(lambda m: re.sub(r"[^\n]", "\x01", m.group()), text)


def functions_of(path, code):
    """name -> (start, position of the name, from, to of the body); its } starts a line, or ends its
    first one."""
    found = {}
    for m in re.finditer(r"^(?:static|[a-zA-Z]).*?\b(\w+)\([^;{}]*\)\s*\{", code, re.M):
        end = code.find("\n", m.end()) if code[m.end()] != "\n" else code.find("\n}", m.end()) + 2
        found[m.group(1)] = (m.start(), m.start(1), m.end(), end)
    wanted = FUNCTIONS.get(path, found)
    return {name: place for name, place in found.items() if name in wanted}


def contract_spans(code):
    return [(m.start(), code.find(";", m.end())) for m in re.finditer(r"\b(CHECK|assert)\(", code)]


def closing(code, at):
    depth = 0
    for i in range(at, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i
    return at


def statements_of(code, body, end):
    """(from, to, kind) of each statement of a function, without its semicolon: calls, assignments,
    increments and jumps; not declarations, without which it would not compile."""
    starts = [m.end() for m in re.compile(r"[;{}]|\b(?:else|do)\b").finditer(code, body, end)]
    starts += [closing(code, m.end()) + 1 for m in HEADER.finditer(code, body, end)]
    for at in sorted([body] + starts):
        at = end - len(code[at:end].lstrip(" \n\x01"))    # skips comments, too
        depth, to = 0, at
        while to < end and depth >= 0 and not (code[to] == ";" and depth == 0):
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(code[to], 0)
            to += 1
        if to == end or depth < 0:
            continue
        statement = " ".join(code[at:to].split())
        if statement in ("break", "continue"):
            yield at, to, statement
        elif DECLARATION.match(statement) or HEADER.match(statement):
            continue
        elif ASSIGNMENT.match(statement):
            yield at, to, "assignment"
        elif re.fullmatch(r"[\w.>()*\[\]-]+(\+\+|--)", statement):
            yield at, to, statement[-2:]
        elif CALL.match(statement):
            yield at, to, f"call of {CALL.match(statement).group(1)}"


def places_of(text, code, body, end):
    """(kind of a place, from, to, [(change, replacement)]) of everything that can be changed in a
    function."""
    for old in dict(OPERATORS):
        for m in re.compile(rf"(?<=\s){re.escape(old)}(?=\s)").finditer(code, body, end):
            yield old, m.start(), m.end(), [(f"{old} to {new}", new) for was, new in OPERATORS
                                            if was == old]
    for m in NUMBER.finditer(code, body, end):
        n = m.group(1)
        changes = [(f"{n} times 1.5", f"({n} * 1.5)")] if "." in n else [
            (f"{n} to {other}", str(other)) for other in (int(n) + 1, int(n) - 1) if other >= 0]
        yield n, m.start(), m.end(), changes
    for m in re.compile(r"(?<![\w)\]])!(?=[\w(*])").finditer(code, body, end):
        yield "!", m.start(), m.end(), [("! left out", "")]
    for m in re.compile(r"\bif\s*(?=\()").finditer(code, body, end):
        to = closing(code, m.end()) + 1
        yield "if", m.end(), to, [("if negated", f"(!{text[m.end():to]})")]
    for begin, to, what in statements_of(code, body, end):
        yield what, begin, to, [(f"{what} left out", "")]


class Mutant(tuple):
    """(from, to, replacement) in a file's text; and its name."""
    name = ""


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def mutants_of(path, text):
    """The functions, and every mutant of a file's text, in order of position."""
    code = code_only(text)
    functions = functions_of(path, code)
    contracts = contract_spans(code)
    found = []
    for function, (_, _, body, end) in functions.items():
        places = [p for p in places_of(text, code, body, end) if not any(a <= p[1] <= b for a,
            b in contracts)]
        count, seen = collections.Counter(p[0] for p in places), collections.Counter()
        for what, begin, to, changes in places:
            seen[what] += 1
            for change, new in changes:
                found.append(Mutant((begin, to, new)))
                found[-1].name = f"{function}: {change}, {seen[what]} of {count[what]}"
    return functions, sorted(found)


def describe(text, mutant):
    """Its line before and after the change, without indentation."""
    begin, end, new = mutant
    first = text.rfind("\n", 0, begin) + 1
    last = text.find("\n", end)
    before, after = text[first:last], text[first:begin] + new + text[end:last]
    return tuple(" ".join(re.sub(r"\s*//.*", "", s).split()) for s in (before, after))


def with_mutants(text, functions, mutants):
    """The file with its functions copied, once unchanged and once per mutant (number -> mutant),
    and in their place a dispatcher that calls the selected copy. Compilers report the copy's file
    as mutant_NUMBER."""
    pieces, at = [], 0
    for name, (start, place, body, end) in functions.items():
        mine = {n: m for n, m in mutants.items() if body <= m[0] < end}
        if not mine:
            continue
        # a function may call itself
        copies = [text[start:body].rstrip().removesuffix("{").rstrip() + ";",
                  text[start:place] + name + "_m0" + text[place + len(name):end]]
        cases = ""
        arguments = re.findall(r"(\w+)\s*(?:\[[^\]]*\])?\s*(?:,|\)$)",
                               text[place + len(name) + 1:body - 1].rstrip())
        call = f"({', '.join(a for a in arguments if a != 'void')});"
        for number, (a, b, new) in mine.items():
            copies.append(f'#line 1 "mutant_{number}"\n' + text[start:place] + f"{name}_m{number}" +
                          text[place + len(name):a] + new + text[b:end])
            cases += f" case {number}: return {name}_m{number}{call}"
        choice = f"switch (mutant) {{{cases} default: return {name}_m0{call} }} }}"
        copies.append(f'#line 1 "all mutants"\n{text[start:body]} {choice}')
        pieces += [text[at:start], "\n".join(copies)]
        at = end
    return "".join(pieces) + text[at:]


# ---- Trying them ----

class Limits:
    def __init__(self, seconds):
        self.cpu = math.ceil(seconds)

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_CPU, (self.cpu, self.cpu + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 34, 1 << 34))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def call(command, seconds, number=0, show=False):
    """Runs a command on that mutant, limited to that much processor time. None if it succeeds, or
    what failed."""
    # syncs are slow
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as tmp:
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive",
                           MUTANT=str(number), TMPDIR=tmp,
                           ASAN_OPTIONS="max_allocation_size_mb=4096", MAKEFLAGS="", LC_ALL="C")
        with open(os.path.join(tmp, "output"), "w+b") as out:
            p = subprocess.Popen(command, cwd=TREE, stdin=subprocess.DEVNULL, stdout=out,
                                 stderr=subprocess.STDOUT,
                                 env=environment, preexec_fn=Limits(seconds),
                                 start_new_session=True)
            try:
                code = p.wait(timeout=3 * seconds + 10)
            except subprocess.TimeoutExpired:
                code = "too slow"
            try:
                os.killpg(p.pid, signal.SIGKILL)         # with its children
            except ProcessLookupError:
                pass
            p.wait()
            out.seek(0)
            text = out.read()
    if show:
        print(text.decode(errors="replace"))
    failed = re.findall(rb"^FAIL (\w+)", text, re.M)
    return None if code == 0 else failed[0].decode() if failed else f"exit code {code}"


def must(error, what):
    if error:
        sys.exit(f"error: {what}: {error}\n  hint: without mutants it must succeed: make test")


class Bench:
    """The programs with all mutants, and the tests of each file with the seconds they take without
    a mutation."""

    def __init__(self, cc, mutants, dead):
        self.cc, self.mutants = cc, mutants
        self.dead = dead                                 # mutants known not to compile
        self.tests = {}                                  # path -> per stage, the result of timed()

    def prepare(self, sources):
        shutil.copytree(ROOT, TREE, copy_function=self.copy, dirs_exist_ok=True,
                        ignore=lambda folder, names: [
            n for n in names if n in ("build", "runs", ".git", "__pycache__")
            or os.path.join(folder, n) in
            [os.path.join(ROOT, path) for path in FILES]])
        self.write("mutant.h", CHOOSE)
        self.weed_out(sources)
        # an optimized engine, the rest quickly built
        make = ["make", "-s", f"CC={self.cc}", "EMULATE=0", "TEST_O=-O0"]
        must(call(make + ["CFLAGS=-O1 -w -include mutant.h", "build/engine_cpu.o",
                          "build/train_gpt"], 900) or
             call(make + ["CFLAGS=-O0 -w -include mutant.h", "all", "build/test_gpt",
                          "build/torture"], 900), "make")
        names = subprocess.check_output(["build/test_gpt", "--list"], cwd=TREE, text=True).split()
        for group, (path, (sanitizers, alone, whole)) in enumerate(FILES.items(), 1):
            program = f"build/tests_{group}"
            must(call([self.cc] + FLAGS + (SANITIZERS if sanitizers else []) +
                      ["-O0", f"-DGROUP={group}", "dev/mutate/tests.c", "build/engine_cpu.o", "-o",
                       program, "-lm",
                       "-pthread"], 600), "cannot compile dev/mutate/tests.c")
            self.tests[path] = [[program, self.timed(program, alone, names)],
                                ["build/test_gpt", self.timed("build/test_gpt", whole, names)]]
        return self.tests

    def copy(self, source, target):                      # only if it changes: make compares times
        if not os.path.exists(target) or not filecmp.cmp(source, target, shallow=False):
            shutil.copy(source, target)

    def write(self, path, text):
        source = os.path.join(WORK, "written")
        with open(source, "w", encoding="utf-8") as f:
            f.write(text)
        self.copy(source, os.path.join(TREE, path))

    def weed_out(self, sources):
        """Writes the sources with the mutants, without those that do not compile."""
        while True:
            for path, (text, functions) in sources.items():
                mine = {n: m for n, (p, m) in self.mutants.items() if p == path
                        and n not in self.dead}
                self.write(path, with_mutants(text, functions, mine))
            p = subprocess.run([self.cc] + FLAGS + ["-fsyntax-only", "train_gpt.c"], cwd=TREE,
                               stderr=subprocess.PIPE,
                               check=False, env=dict(os.environ, LC_ALL="C"))
            more = {int(n) for n in re.findall(rb"^mutant_(\d+):\d+:\d+: (?:fatal )?error",
                                               p.stderr, re.M)}
            if p.returncode == 0:
                return
            must(None if more else p.stderr.decode()[:2000], "cannot compile train_gpt.c")
            self.dead += more

    def timed(self, program, pattern, names):
        """name -> [1 + mutants caught, seconds without a mutation]."""
        found = {}
        wanted = re.compile("|".join(pattern.split()))
        for name in filter(wanted.fullmatch, names):
            begin = time.monotonic()
            must(call([program, name], 300), f"{program} {name}")
            found[name] = [1, time.monotonic() - begin]
        return found

    def attempt(self, number, stage, show):
        """What caught a mutant; "compiler" if it does not compile; None if nothing did."""
        if number in self.dead:
            return "compiler"
        program, tests = self.tests[self.mutants[number][0]][stage]
        # fast tests that catch many come first
        order = sorted(tests, key=lambda name: tests[name][1] / tests[name][0])
        # tests.c stops at the first failure
        for names in [order] if stage == 0 else [[name] for name in order]:
            caught = call([program] + names, 1 + 10 * sum(tests[name][1] for name in names), number,
                          show)
            if caught:
                if caught in tests:
                    tests[caught][0] += 1
                return caught
        return None


# ---- The program ----

def read_reasons(mutants):
    """name -> reason, from survivors.txt: blocks of names, one per line, followed by their reason,
    indented. Ends with an error if a name is duplicated or does not exist."""
    names = {m.name for _, m in mutants.values()}
    reasons, block, wrong = {}, [], []
    with open(SURVIVORS, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                for name in block:
                    reasons[name] = (reasons[name] + " " + line.strip()).strip()
                continue
            if not block or reasons[block[-1]]:
                block = []
            name = line.strip()
            if name in reasons:
                wrong.append(f"{number}: named twice: {name}")
            elif name not in names:
                start = name.rpartition(",")[0]
                near = sum(n.startswith(start + ",") for n in names)
                wrong.append(f"{number}: no mutant has the name {name}" +
                             (f" ({near} are {start})" if near else ""))
            block.append(name)
            reasons[name] = ""
    wrong += [f"no reason for {name}" for name, reason in reasons.items() if not reason]
    if wrong:
        path = os.path.relpath(SURVIVORS, ROOT)
        sys.exit("\n".join(f"error: {path}:{w}" for w in wrong) +
                 "\n  hint: --since REVISION converts the names of that revision where it can; "
                 "--list FUNCTION prints the existing names")
    return reasons


def pieces(text, body, end):
    """(token, position) of a function's code, without comments and white space."""
    piece = re.compile(r"\w+|[<>=!+\-*/%&|]+|[^\s\x01]")
    return ((m.group(), m.start()) for m in piece.finditer(code_only(text), body, end))


def follow(revision):
    """Converts the names in survivors.txt from those of a revision: finds the same change at the
    place that the surrounding code identifies. A mutant without such a place keeps its name."""
    names = {}
    if subprocess.run(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
                      cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"error: --since {revision}: no such revision")
    for path in FILES:
        p = subprocess.run(["git", "show", f"{revision}:{path}"], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, check=False)
        if p.returncode:                                 # a file that came later
            continue
        sides = []
        for text in (p.stdout.decode(), read(path)):
            functions, mutants = mutants_of(path, text)
            sides.append((text, functions, mutants))
        (old_text, old_functions, old), (new_text, new_functions, new) = sides
        now = {(m.name.rpartition(",")[0], m[0]): m.name for m in new}
        for function in old_functions.keys() & new_functions.keys():
            a, b = (list(pieces(text, *functions[function][2:])) for text, functions in
                    ((old_text, old_functions), (new_text, new_functions)))
            same = difflib.SequenceMatcher(None, [x[0] for x in a], [x[0] for x in b], False)
            to = {a[k.a + i][1]: b[k.b + i][1]
                  for k in same.get_matching_blocks() for i in range(k.size)}
            for m in old:
                change, _, _ = m.name.rpartition(",")
                if change.startswith(function + ":") and m[0] in to:
                    names[m.name] = now.get((change, to[m[0]]), m.name)
    with open(SURVIVORS, encoding="utf-8") as f:
        lines = f.read().split("\n")
    renamed = [names.get(line, line) for line in lines]
    with open(SURVIVORS, "w", encoding="utf-8") as f:
        f.write("\n".join(renamed))
    print(f"{sum(x != y for x, y in zip(lines, renamed))} survivors have new names")


def digest(names):
    state = hashlib.sha256()
    for name in names:
        with open(os.path.join(ROOT, name), "rb") as f:
            state.update(name.encode() + f.read())
    return state.hexdigest()


def load(store):
    """The known results: for a file, as long as it is unchanged; for survivors, as long as the
    tests are."""
    now = {path: digest([path]) for path in FILES}
    others = {os.path.relpath(name, ROOT) for name in glob.glob(os.path.join(ROOT, "dev/**/*.[ch]"),
        recursive=True)}
    now["tests"] = digest(sorted(others - set(FILES)))
    if not os.path.exists(store):
        return {"digests": now, "results": {}, "dead": []}
    with open(store, encoding="utf-8") as f:
        state = json.load(f)
    same = {name: state["digests"].get(name) == value for name, value in now.items()}
    state["results"] = {key: caught for key, caught in state["results"].items()
                        if same[key.split(":")[0]] and (caught not in ("", "later")
                                                        or same["tests"])}
    state["digests"] = now
    if not all(same[path] for path in FILES):
        state["dead"] = []
    if not all(same.values()):
        state.pop("tests", None)
    return state


def report(sources, mutants, results, reasons):
    rows = {path: {"caught": 0, "survived": 0, "the same": 0, "no program": 0, "not tried": 0}
            for path in sources}
    unknown, wrong = 0, []
    for number, (path, mutant) in mutants.items():
        caught = results.get(key_of(path, mutant))
        text = sources[path][0]
        before, after = describe(text, mutant)
        reason = reasons.get(mutant.name)
        same = reason and reason.startswith("The same")
        rows[path]["not tried" if caught in (None, "later") else "no program"
                   if caught == "compiler" else
                   "caught" if caught else "the same" if same else "survived"] += 1
        if caught == "":
            unknown += reason is None
            print(f"\nsurvived: {number} at {path}:{line_of(text, mutant)}\n{mutant.name}\n  - "
                  f"{before}\n  + {after}\n"
                  f"  {reason or 'NO REASON in dev/mutate/survivors.txt'}")
        elif reason and caught not in (None, "later"):
            wrong.append(f"{mutant.name}: "
                         f"{'is no program' if caught == 'compiler' else 'caught by ' + caught}")
    print(f"\n{'file':18}" + "".join(f"{name:>12}" for name in rows["train_gpt.c"]) +
          f"{'per cent':>12}")
    good = True
    for path, row in rows.items():
        share = 100.0 * row["caught"] / max(1, row["caught"] + row["survived"])
        good = good and share >= LEAST
        print(f"{path:18}" + "".join(f"{n:12}" for n in row.values()) + f"{share:12.1f}")
    print(f"{unknown} survivors without a reason")
    for name in wrong:
        print(f"in survivors.txt, but {name}")
    return good and not unknown and not wrong


def line_of(text, mutant):
    return text.count("\n", 0, mutant[0]) + 1


def key_of(path, mutant):
    return f"{path}:{mutant.name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="stop after that long; the next call continues")
    parser.add_argument("--only", nargs="+", metavar="MUTANT",
                        help="numbers or functions: retry only these")
    parser.add_argument("--survivors", action="store_true", help="retry those in survivors.txt")
    parser.add_argument("--jobs", type=int, default=1, help="mutants run concurrently")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--list", nargs="*", metavar="FUNCTION")
    parser.add_argument("--check", action="store_true",
                        help="check that survivors.txt names existing mutants")
    parser.add_argument("--since", metavar="REVISION",
                        help="convert survivors.txt from the names of that revision")
    o = parser.parse_args()
    if o.since:
        follow(o.since)
    sources, mutants, owners = {}, {}, {}
    for path in FILES:
        text = read(path)
        functions, found = mutants_of(path, text)
        missing = [name for name in FUNCTIONS.get(path, ()) if name not in functions]
        if missing:
            sys.exit(f"error: {path} has no function {', '.join(missing)}\n"
                     f"  hint: FUNCTIONS of {__file__}")
        sources[path] = text, functions
        for name in functions:
            if owners.setdefault(name, path) != path:
                sys.exit(f"error: {owners[name]} and {path} both have a function {name}: its "
                         f"mutants have no names")
        mutants.update(enumerate([(path, m) for m in found], len(mutants) + 1))
    if o.list is not None:
        for number, (path, m) in mutants.items():
            if not o.list or m.name.split(":")[0] in o.list:
                text = sources[path][0]
                print(f"{number} {m.name}\n    {path}:{line_of(text, m)}: "
                      f"{' -> '.join(describe(text, m))}")
        return 0
    reasons = read_reasons(mutants)
    if o.check:
        print(f"{len(reasons)} survivors of {len(mutants)} mutants: each name has its mutant")
        return 0
    if o.jobs < 1:
        parser.error("--jobs must be at least 1")
    only = [n for n, (_, m) in mutants.items() if o.survivors and m.name in reasons]
    for word in o.only or []:
        found = [n for n, (_, m) in mutants.items() if word in (str(n), m.name.split(":")[0])]
        if not found:
            parser.error(f"--only {word}: neither a function nor a number from 1 to {len(mutants)} "
                         f"(--list)")
        only += found
    os.makedirs(WORK, exist_ok=True)
    lock = open(os.path.join(WORK, "lock"), "w", encoding="ascii")       # released with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"error: another mutate.py is running in {WORK}")
    begin, store = time.monotonic(), os.path.join(WORK, "results.json")
    state = load(store)
    results = state["results"]
    for number in only:
        results.pop(key_of(*mutants[number]), None)
    left = only or [n for n, (path, m) in mutants.items() if results.get(key_of(path, m),
        "later") == "later"]
    if left:
        bench = Bench(o.cc, mutants, state["dead"])
        bench.tests = state["tests"] = state.get("tests") or bench.prepare(sources)
    for stage in (0, 1):
        def attempt(number, stage=stage):
            late = time.monotonic() - begin > o.seconds
            return number, False if late else bench.attempt(number, stage, bool(o.only))

        todo = [n for n in left if (results.get(key_of(*mutants[n])) == "later") == (stage == 1)]
        with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
            for number, caught in pool.map(attempt, todo):
                if caught is False:
                    continue
                path, m = mutants[number]
                results[key_of(path, m)] = caught or ("" if stage else "later")
                with open(store, "w", encoding="utf-8") as f:
                    json.dump(state, f)
                line = line_of(sources[path][0], m)
                print(f"{number}/{len(mutants)} {path}:{line}: {caught or 'survived'}", flush=True)
    return 0 if report(sources, mutants, results, reasons) else 1


if __name__ == "__main__":
    sys.exit(main())
