"""Writes analysis.safetensors: reference results for the tools that analyze a model, computed
independently.

Run:    python3 dev/golden/make_analysis.py [OUTPUT]     (default: analysis.safetensors, here)
Needs:  pip install torch numpy safetensors

ReplaceMe: the streams of the model of golden.safetensors in PyTorch float64, and maps by
numpy.linalg.lstsq, a ridge by more equations and never by normal equations. Neural collapse: the
formulas of the neural-collapse package (kernels.py, measure.py and util.py at c05a0b8), restated
here pair by pair in float64. dev/golden/README.md lists the tensors.
"""
import math
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402

from make_golden import (B, C, L, T, V, attention_branch, layernorm, mlp_branch,  # noqa: E402
                         read_golden, write)

ROWS = 16                        # of the calibration, T tokens each
RIDGE = 0.25                     # of tr(G)/C


# ---- ReplaceMe ----

def streams(w, tokens):
    """The residual stream after the embeddings and after each branch, 2L+1 of (rows,T,C)."""
    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:tokens.shape[1]]
    points = [x]
    for l in range(L):
        for branch in (attention_branch, mlp_branch):
            x = x + branch(w, l, x)
            points.append(x)
    return points


def lstsq(m, a2, ridge=0.0, zero=False, affine=False):
    """The map T (C,C) and c (C): least squares of [M; sqrt(a) I] T = [a2; sqrt(a) I or 0]."""
    mean_m, mean_a = (m.mean(0), a2.mean(0)) if affine else (np.zeros(C), np.zeros(C))
    x, y = m - mean_m, a2 - mean_a
    a = ridge * (x ** 2).sum() / C
    root = math.sqrt(a) * np.eye(C)
    t = np.linalg.lstsq(np.vstack([x, root]), np.vstack([y, 0 * root if zero else root]),
                        rcond=None)[0]
    return t, mean_a - mean_m @ t


def cosine(m, z, y, epochs, lr):
    """Adam on the mean of 1 - cos(Z + M T + c, Y), all tokens per step, from T = I and c = 0."""
    m, z, y = (torch.from_numpy(v.astype(np.float64)) for v in (m, z, y))
    t, c = torch.eye(C, dtype=torch.float64, requires_grad=True), torch.zeros(C,
        dtype=torch.float64, requires_grad=True)
    optimizer, losses = torch.optim.Adam([t, c], lr=lr), []
    with torch.enable_grad():
        for _ in range(epochs + 1):
            loss = (1 - torch.nn.functional.cosine_similarity(z + m @ t + c, y, dim=-1)).mean()
            losses.append(loss.item())
            if len(losses) <= epochs:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return t.detach().numpy(), c.detach().numpy(), losses


def replace_case(w, tokens, evaluated, first, end, name):
    points = streams(w, tokens)
    z, x, y = (points[p].reshape(-1, C).numpy().astype(np.float32) for p in (2 * first - 1,
        2 * first, 2 * end))
    m, d = x - z, y - x                                  # in float32, as an engine sees them
    out = {f"{name}/m": m, f"{name}/d": d, f"{name}/layers": np.array([first, end], np.int32)}
    wide, a2 = m.astype(np.float64), d.astype(np.float64) + m.astype(np.float64)
    for how, options in {"plain": {}, "affine": {"affine": True}, "ridge": {"ridge": RIDGE},
                         "both": {"ridge": RIDGE, "affine": True},
                         "zero": {"ridge": RIDGE, "zero": True}}.items():
        t, c = lstsq(wide, a2, **options)
        left = ((a2 - wide @ t - c) ** 2).sum() / (d.astype(np.float64) ** 2).sum()
        out |= {f"{name}/{how}/t": t, f"{name}/{how}/c": c, f"{name}/{how}/left": np.array([left])}
    if name == "two":
        t, c, losses = cosine(m, z, d + x, 7, 0.01)
        out |= {f"{name}/z": z, f"{name}/y": d + x, f"{name}/cosine/t": t, f"{name}/cosine/c": c,
                f"{name}/cosine/loss": np.array([losses[0], losses[-1]])}
    gram = wide.T @ wide
    out[f"{name}/condition"] = np.array([np.linalg.cond(gram, 1)])

    points = streams(w, evaluated)                       # the map put between, and not folded into
                                                         # weights
    z, x = points[2 * first - 1], points[2 * first]
    t, c = (torch.from_numpy(out[f"{name}/affine/{v}"]) for v in "tc")
    x = z + (x - z) @ t + c
    for l in range(end, L):
        x = x + attention_branch(w, l, x)
        x = x + mlp_branch(w, l, x)
    out[f"{name}/logits"] = (layernorm(x, w["ln_f.weight"],
                                       w["ln_f.bias"]) @ w["wte.weight"].T).numpy()
    return out


# ---- Neural collapse ----

def symm_reduce(grid):
    """The mean over pairs i < j."""
    return grid[np.triu_indices(len(grid), 1)].sum() / (len(grid) * (len(grid) - 1) / 2)


def collapse(h, labels, val_h, val_labels, head, min_count):
    counts = np.bincount(labels, minlength=V)
    seen = np.flatnonzero(counts >= 1)
    every = np.array([h[labels == c].mean(0) for c in seen])
    chosen = np.flatnonzero(counts >= min_count)
    M = np.array([h[labels == c].mean(0) for c in chosen])
    variance = np.array([((h[labels == c] - h[labels == c].mean(0)) ** 2).sum(1).mean()
                         for c in chosen])
    K, center = len(chosen), M.mean(0)
    square = ((M[:, None] - M[None]) ** 2).sum(-1) + np.eye(K)
    pair = (variance[:, None] + variance[None]) / 2
    centred = M - center
    norms = np.linalg.norm(centred, axis=1)
    unit = centred / norms[:, None]
    gram = centred @ centred.T
    struct = gram / np.linalg.norm(gram) + 1 / K / math.sqrt(K - 1) - np.eye(K) / math.sqrt(K - 1)
    kernel = -np.log(np.linalg.norm(unit[:, None] - unit[None], axis=-1) + np.eye(K))
    log_mean = symm_reduce(kernel)
    W = head[chosen]
    dual = centred @ W.T
    dual = dual / np.linalg.norm(dual) + 1 / K / math.sqrt(K - 1) - np.eye(K) / math.sqrt(K - 1)
    cosine = (unit * W).sum(1) / np.linalg.norm(W, axis=1)
    by_head = (val_h @ head.T).argmax(1)
    by_mean = seen[((val_h[:, None] - every[None]) ** 2).sum(-1).argmin(1)]
    log_norms = np.log(norms)
    return {"classes": K, "coverage": counts[chosen].sum() / counts.sum(),
            "cdnv": symm_reduce(pair / square), "cdnv2": symm_reduce(pair / square ** 2),
            "norm_mean": norms.mean(), "norm_cov": norms.std(ddof=1) / norms.mean(),
            "log_norm_cov": log_norms.std(ddof=1) / abs(log_norms.mean()),
            "etf_error": np.linalg.norm(struct), "log_kernel": log_mean,
            "log_kernel_var": symm_reduce((kernel - log_mean) ** 2),
            "duality": cosine.mean(), "duality_var": cosine.var(ddof=1),
            "dual_error": np.linalg.norm(dual),
            "agreement": (by_head == by_mean).mean(),
            "head_accuracy": (by_head == val_labels).mean(),
            "mean_accuracy": (by_mean == val_labels).mean(), "val_coverage": np.isin(val_labels,
                seen).mean()}


def collapse_case(rng):
    """Features around class means, few of some classes; a head that is only partly their dual."""
    means = rng.standard_normal((V, C))
    weight = 1 / np.arange(1, V + 1)
    head = (means + 0.7 * rng.standard_normal((V, C))).astype(np.float32)
    out = {"collapse/head": head}
    parts = []
    for name, n in {"train": 150, "val": 60}.items():
        labels = rng.choice(V, n, p=weight / weight.sum()).astype(np.int32)
        h = (0.5 + means[labels] + 0.4 * rng.standard_normal((n, C))).astype(np.float32)
        out |= {f"collapse/{name}_features": h, f"collapse/{name}_labels": labels}
        parts += [h.astype(np.float64), labels]
    numbers = collapse(*parts, head.astype(np.float64), 2)
    return out | {f"collapse/{name}": np.array([float(value)]) for name, value in numbers.items()}


def main():
    torch.set_num_threads(1)
    params, scored, _ = read_golden()
    w = {name: torch.from_numpy(value) for name, value in params.items()}
    rng = np.random.default_rng(2505)
    tokens = rng.integers(0, V, (ROWS, T), dtype=np.int32)
    out = {"tokens": tokens}
    with torch.no_grad():
        for name, (first, end) in {"one": (2, 3), "two": (1, 3), "middle": (1, 2)}.items():
            out |= replace_case(w, tokens, scored, first, end, name)
    out |= collapse_case(rng)
    assert out["two/logits"].shape == (B, T, V)
    write(out, "analysis.safetensors", __doc__)


if __name__ == "__main__":
    main()
