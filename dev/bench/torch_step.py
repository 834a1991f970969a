"""The same training step in PyTorch, eager and compiled, in fp32 and under bf16 autocast,
alternating with build/bench.

    python3 dev/bench/torch_step.py --preset gpt2 --batch 4 --seq-len 64  (needs PyTorch: torch.sh)
    python3 dev/bench/torch_step.py --device cuda --preset gpt2 --batch 32 --seq-len 1024

GPT-2 with a tied head, random tokens, AdamW with weight decay on matrices only, gradients clipped
to a norm of 1. All configurations share one model and one optimizer. In each round, each of them
runs a slice of steps right after a slice of ours, in fp32 after fp32 and in bf16 after bf16, so
that both see the same machine: the ratio is the median over rounds of (its time / ours beside it).
On a GPU, compiled PyTorch under bf16 autocast is compared with build/bench_cuda, its vocabulary
padded to a multiple of 128 in its favour; if both do not fit in memory, --apart measures ours
first.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import torch  # noqa: E402
from torch import nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0     # as in steps.h


def presets():
    """name: (V, T, L, NH, C), from the table in gpt.h."""
    row = re.compile(r'\{"([\w-]+)",\s*\{\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\}\}')
    return {name: tuple(map(int, sizes)) for name,
            *sizes in row.findall((HERE.parent / "gpt.h").read_text())}


# ---- The model ----

class Block(nn.Module):
    def __init__(self, heads, channels):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.attn_proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc, self.fc_proj = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):                                                  # (B,T,C)
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for part in self.attn(self.ln_1(x)).split(C, dim=2))    # (B,NH,T,HS)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fc_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, vocabulary, positions, layers, heads, channels):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, channels), nn.Embedding(positions, channels)
        self.blocks = nn.ModuleList(Block(heads, channels) for _ in range(layers))
        self.ln_f = nn.LayerNorm(channels)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if "proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    # (B,T) (B,T) -> the mean loss
    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- The step ----

class Step:
    """A callable that runs n steps and returns the milliseconds per step."""

    def __init__(self, model, optimizer, tokens, targets, bf16):
        self.model, self.optimizer, self.bf16 = model, optimizer, bf16
        self.tokens, self.targets = tokens, targets

    def loss(self):
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(self.tokens, self.targets)

    def wait(self):
        if self.tokens.device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self, n):
        self.wait()
        start = time.perf_counter()
        for _ in range(n):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
        self.wait()
        return 1e3 * (time.perf_counter() - start) / n


def make_steps(sizes, args):
    """(name, dtype): Step."""
    torch.manual_seed(1)
    if args.device == "cuda":
        # tf32 for what autocast leaves in fp32
        torch.set_float32_matmul_precision("high")
    vocabulary = -(-sizes[0] // 128) * 128 if args.device == "cuda" else sizes[0]
    with torch.device(args.device):
        model = Gpt(vocabulary, *sizes[1:])
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                   {"params": vectors, "weight_decay": 0.0}], lr=LR, betas=BETAS,
                                   eps=EPS, fused=True)
    tokens, targets = torch.randint(sizes[0], (2, args.batch, args.seq_len)).to(args.device)
    models = {"eager": model} if args.device == "cpu" or args.eager_only else {}
    models |= {} if args.eager_only else {"compiled": torch.compile(model)}
    return {(f"PyTorch {name}", dtype): Step(m, optimizer, tokens, targets, dtype == "bf16")
            for dtype in DTYPES[args.device] for name, m in models.items()}


def check(steps, vocabulary):
    """All configurations must agree on the fresh model's loss, and a step must lower it. Also
    compiles and warms up."""
    want = math.log(vocabulary)
    losses = {", ".join(key): step.loss().item() for key, step in steps.items()}
    for name, loss in losses.items():
        if not abs(loss - want) < 0.5:
            raise SystemExit(f"error: {name}: the loss of a fresh model is {loss:.4f}, far from ln "
                             f"V = {want:.4f}")
    if max(losses.values()) - min(losses.values()) > 0.05:
        raise SystemExit(f"error: the configurations disagree on the loss: {losses}")
    for key, step in steps.items():
        before = step.loss().item()
        step(2)
        if not step.loss().item() < before:
            raise SystemExit(f"error: {', '.join(key)}: two steps do not lower the loss on the "
                             f"same tokens")


class Ours:
    """build/bench --only turns, or build/bench_cuda's: waits for a request of n steps, and returns
    the milliseconds per step."""

    def __init__(self, args, dtype):
        command = [args.bench, "--only", "turns", "--dtype", dtype, "--preset", args.preset,
                   "--batch", str(args.batch),
                   "--seq-len", str(args.seq_len)] + (["--threads", str(args.threads)]
                                                      if args.device == "cpu" else [])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def __call__(self, n):
        # it has reported the reason on standard error
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{n}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.process.args[0]} has ended early")
        return float(line)

    def close(self):
        self.process.stdin.close()
        if self.process.wait():
            raise SystemExit(f"error: {self.process.args[0]} failed")


# ---- Measuring ----

def slice_steps(ours):
    # slices of half a second
    return {dtype: max(1, round(500 / our(2))) for dtype, our in ours.items()}


def measure(ours, steps, rounds):
    """From ours {dtype: Ours} and steps: ({key: [ms]}, {key: [ms of ours in its dtype, in the
    preceding slice]}), one per round."""
    n = slice_steps(ours)
    theirs, beside = {key: [] for key in steps}, {key: [] for key in steps}
    for _ in range(rounds):
        for (name, dtype), step in steps.items():
            beside[name, dtype].append(ours[dtype](n[dtype]))
            theirs[name, dtype].append(step(n[dtype]))
    return theirs, beside


def measure_apart(args, sizes):
    """The same, but ours has ended, and its memory is free, before PyTorch starts."""
    ours = {dtype: Ours(args, dtype) for dtype in DTYPES[args.device]}
    n = slice_steps(ours)
    first = {dtype: [our(n[dtype]) for _ in range(args.rounds)] for dtype, our in ours.items()}
    for our in ours.values():
        our.close()
    steps = make_steps(sizes, args)
    check(steps, sizes[0])
    theirs = {key: [step(n[key[1]]) for _ in range(args.rounds)] for key, step in steps.items()}
    return theirs, {key: first[key[1]] for key in steps}


def measure_in_turn(args, sizes):
    steps = make_steps(sizes, args)
    check(steps, sizes[0])
    ours = {dtype: Ours(args, dtype) for dtype in DTYPES[args.device]}
    theirs, beside = measure(ours, steps, args.rounds)
    for our in ours.values():
        our.close()
    return theirs, beside


def ratio_of(theirs, beside, key):
    return statistics.median(t / o for t, o in zip(theirs[key], beside[key]))


def compare_best(theirs, beside):
    """{what: (PyTorch's best configuration, our dtype, its time / ours)} in each dtype, and the
    best overall against our best.

    In a dtype, the best configuration is the one with the smallest time over ours beside it.
    Overall, each side's best has the smallest median time; the ratio is the median over rounds of
    PyTorch's slice over our slices in that round."""
    best, dtypes = {}, list(dict.fromkeys(key[1] for key in theirs))
    for dtype in dtypes:
        key = min((key for key in theirs if key[1] == dtype), key=lambda key: ratio_of(theirs,
            beside, key))
        best[dtype] = (*key, dtype, ratio_of(theirs, beside, key))
    if len(dtypes) == 1:
        return best
    ours = {dtype: [statistics.mean(slices) for slices in zip(*(beside[key] for key in beside
        if key[1] == dtype))]
            for dtype in dtypes}                                           # one value per round
    our_dtype = min(ours, key=lambda dtype: statistics.median(ours[dtype]))
    key = min(theirs, key=lambda key: statistics.median(theirs[key]))
    best["any dtype"] = (*key, our_dtype, statistics.median(t / o for t, o in zip(theirs[key],
        ours[our_dtype])))
    return best


# ---- Results ----

def where(args):
    if args.device == "cpu":
        return {"threads": args.threads}
    return {"device": torch.cuda.get_device_name(), "apart": args.apart}


def record(name, dtype, times, ratio, args):
    median = statistics.median(times)
    return {"name": name, "dtype": dtype, "preset": args.preset, "batch": args.batch,
            "seq_len": args.seq_len,
            **where(args), "torch": torch.__version__, "rounds": args.rounds, "median_ms": median,
            "best_ms": min(times), "tokens_per_s": 1e3 * args.batch * args.seq_len / median,
            "ratio": ratio}


def report(theirs, beside, args):
    """Prints the table and the comparison of the best configurations; returns both as records."""
    records = []
    for dtype in DTYPES[args.device]:
        keys = [key for key in theirs if key[1] == dtype]
        records.append(record("droppath.c", dtype, sum((beside[key] for key in keys), []), 1.0,
                              args))
        records += [record(*key, theirs[key], ratio_of(theirs, beside, key), args) for key in keys]
    print(f"{args.preset}, B {args.batch}, T {args.seq_len}, "
          f"{f'{args.threads} threads' if args.device == 'cpu' else where(args)['device']}, "
          f"PyTorch {torch.__version__}")
    print(f"{'':18} {'':5} {'median ms':>10} {'best ms':>10} {'tokens/s':>10} {'time / ours':>12}")
    for r in records:
        print(f"{r['name']:18} {r['dtype']:5} {r['median_ms']:10.1f} {r['best_ms']:10.1f} "
              f"{r['tokens_per_s']:10.0f} "
              f"{r['ratio']:12.3f}")
    for what, (name, dtype, our_dtype, ratio) in compare_best(theirs, beside).items():
        print(f"PyTorch's best / ours, {what + ':':10} {ratio:6.3f}   ({name}, {dtype} / "
              f"droppath.c, {our_dtype})")
        records.append({"name": "PyTorch's best / ours", "what": what, "theirs": f"{name}, {dtype}",
                        "ours": our_dtype,
                        "preset": args.preset, "batch": args.batch, "seq_len": args.seq_len,
                        **where(args),
                        "torch": torch.__version__, "rounds": args.rounds, "ratio": ratio})
    return records


def main():
    table = presets()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--preset", choices=table, default="gpt2")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=7, help="slices of each configuration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager-only", action="store_true",
                        help="skip torch.compile, which takes minutes to start")
    parser.add_argument("--apart", action="store_true", help="ours first, then PyTorch, for models "
                        "that do not fit in memory together")
    parser.add_argument("--bench", help="our program; default: build/bench, on a GPU "
                        "build/bench_cuda")
    parser.add_argument("--json", help="append a line of JSON per row and per comparison to this "
                        "file")
    args = parser.parse_args()

    args.bench = args.bench or {"cpu": "build/bench", "cuda": "build/bench_cuda"}[args.device]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch sees no GPU\n  hint: nvidia-smi lists them; "
                         "torch.version.cuda must not be None")
    torch.set_num_threads(args.threads)
    try:
        theirs, beside = (measure_apart if args.apart else measure_in_turn)(args,
            table[args.preset])
    except torch.cuda.OutOfMemoryError:
        raise SystemExit("error: PyTorch is out of memory\n  hint: use a smaller --batch" +
                         ("" if args.apart else ", or --apart"))
    records = report(theirs, beside, args)
    if args.json:
        with open(args.json, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()
