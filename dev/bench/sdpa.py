"""PyTorch's scaled_dot_product_attention compared with our attention, on the shapes measured by
build/kernels_cuda.

    build/kernels_cuda --only attention && python3 dev/bench/sdpa.py     (build/kernels_cuda.json)

Each backend that accepts the shape is timed forward and backward with device events; the best of
each counts. Queries, keys and values are laid out as in a model: parts of one (B,T,3C). Causal. "of
best" is the best backend's time / ours.
"""
import argparse
import json
import os
import statistics
import sys
import time
import warnings

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import torch  # noqa: E402
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# the plain one stores all scores
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


def milliseconds(run, device, rounds, slice_ms=30):
    """The median over the rounds of the time per run, in slices of about slice_ms."""
    def slice_of(n):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(n):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / n
        start = time.perf_counter()
        for _ in range(n):
            run()
        return 1e3 * (time.perf_counter() - start) / n

    slice_of(2)
    n = max(1, round(slice_ms / slice_of(2)))
    return statistics.median(slice_of(n) for _ in range(rounds))


def tensors(shape, device):
    """q, k, v, (B,NH,T,HS) in one (B,T,3,NH,HS), and the gradient of the output, given as
    (B,T,NH,HS)."""
    torch.manual_seed(1)
    B, NH, T, HS = (int(shape[key]) for key in ("batch", "heads", "seq_len", "head_size"))
    dtype = DTYPES[shape["dtype"]]
    qkv = torch.randn(B, T, 3, NH, HS, device=device, dtype=dtype)
    q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2))
    return q, k, v, torch.randn(B, T, NH, HS, device=device, dtype=dtype).transpose(1, 2)


def measure_backend(name, inputs, device, rounds):
    """(forward ms, backward ms), or None if the backend does not accept the shape or is wrong."""
    q, k, v, dy = inputs
    try:
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
            # a backend that refuses explains it at length
            warnings.simplefilter("ignore")
            def forward():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out = forward()
            times = (milliseconds(forward, device, rounds),
                     milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dy,
                         retain_graph=True), device, rounds))
    # no such backend, or not for this shape or device
    except (RuntimeError, AttributeError):
        return None
    # the first row, by the formula
    with torch.no_grad():
        want = F.scaled_dot_product_attention(*(x[:1].double().cpu() for x in (q, k, v)),
                                              is_causal=True)
    if not (out[:1].detach().double().cpu() - want).abs().max() < (0.05 if q.dtype == torch.bfloat16
        else 1e-2):
        raise SystemExit(f"error: {name} is wrong on {tuple(q.shape)}")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="build/kernels_cuda.json",
                        help="output of build/kernels_cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=6, help="slices of each backend")
    parser.add_argument("--json", help="write the records to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch sees no GPU\n  hint: nvidia-smi lists them; "
                         "torch.version.cuda must not be None")
    with open(args.kernels, encoding="utf-8") as f:
        shapes = json.load(f)["attention"]
    if not shapes:
        raise SystemExit(f"error: {args.kernels} has no attention\n  hint: build/kernels_cuda "
                         f"--only attention")
    records = []
    print(f"{'':12} {'B x NH x T x HS':20} {'':8} {'ours ms':>9} {'best ms':>9} {'of best':>8} "
          f"  PyTorch {torch.__version__}")
    for shape in shapes:
        inputs = tensors(shape, args.device)
        times = {name: measure_backend(name, inputs, args.device, args.rounds) for name in BACKENDS}
        times = {name: t for name, t in times.items() if t}
        for i, way in enumerate(("forward", "backward")):
            if not times:
                continue
            best = min(times, key=lambda name: times[name][i])
            ours, theirs = shape[f"{way}_ms"], times[best][i]
            size = " x ".join(str(int(shape[key])) for key in ("batch", "heads", "seq_len",
                "head_size"))
            print(f"{shape['preset']:12} {size:20} {way:8} {ours:9.3f} {theirs:9.3f} "
                  f"{100 * theirs / ours:7.1f}%   {best}")
            records.append({**{key: shape[key] for key in ("preset", "dtype", "batch", "heads",
                "seq_len", "head_size")},
                            "way": way, "ours_ms": ours, "best_ms": theirs, "backend": best,
                            "of_best": theirs / ours,
                            "tflops": 1e-9 * shape[f"{way}_flops"] / ours,
                            "all_ms": {name: t[i] for name, t in times.items()},
                            "torch": torch.__version__})
    if not records:
        raise SystemExit("error: no backend accepts these shapes")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(records, f, indent=1)


if __name__ == "__main__":
    main()
