"""Writes attention.safetensors: like golden.safetensors, with attention's scores edited.

Run:    python3 dev/golden/make_attention.py [OUTPUT]     (default: attention.safetensors here)
Needs:  pip install torch numpy safetensors

The model, weights, plans and tokens are those of make_golden.py, the Philox that of
make_companions.py. Scores are edited as dev/model/noise.h says (AttentionDrop, arXiv 2504.12088, in
a causal form). README.md lists the tensors.
"""
import math
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402

from make_companions import ATTN, factors  # noqa: E402
from make_golden import (B, C, CASES, L, NH, T, V, layernorm, leaves, mlp_branch,  # noqa: E402
                         read_golden, store_gradients, write)

SCORES = 8                                         # NOISE_SCORES of noise.h
HARD, BLUR = 1, 2

# name: (plan, seed, step, first row, dropout of attention, kind, rate in 2^-16, k, masks, width,
# sigma)
EDITED = {
    "zero": ("row", 5, 9, 2, 0, HARD, 30000, 3, 0, 0, 0.0),
    "mask": ("tied_row", (7 << 32) + 1, 4, 0, 13107, HARD, 45000, 4, 1, 0, 0.0),
    "blur": ("full", 1, 0, 0, 6554, BLUR, 0, 0, 0, 5, 1.3),
}


def drop_largest(scores, dropped, k, masks):
    """scores (B,NH,T,T), -inf where a query sees no key; dropped: which keys are, if they are among
    the k largest."""
    order = torch.argsort(scores.detach(), dim=-1, descending=True, stable=True)
    rank = torch.argsort(order, dim=-1)
    drops = dropped & (rank < k) & torch.isfinite(scores)
    if masks:                                      # a query must see something
        nothing = (torch.isfinite(scores) & ~drops).sum(-1, keepdim=True) == 0
        drops &= ~(nothing & (rank == 0))
    return scores.masked_fill(drops, -math.inf if masks else 0.0)


def blur(scores, width, sigma):
    """Each score becomes the weighted mean of those around it that the query sees."""
    at = torch.arange(T, dtype=torch.float64)
    apart = at[:, None] - at[None, :]              # (j, j')
    weight = torch.exp(-apart ** 2 / (2 * sigma ** 2)) * (apart.abs() <= width // 2)
    seen = torch.isfinite(scores)
    sums = torch.where(seen, scores, 0.0) @ weight / (seen.double() @ weight).clamp_min(1e-300)
    return sums.masked_fill(~seen, -math.inf)


def edited_logits(w, tokens, name):
    case, seed, step, first_row, attn, kind, rate, k, masks, width, sigma = EDITED[name]
    kept, scale, tied = CASES[case]
    # (2L,B,1,1)
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)

    def attention_branch(l, x):
        h = layernorm(x, w[f"h.{l}.ln_1.weight"], w[f"h.{l}.ln_1.bias"])
        qkv = h @ w[f"h.{l}.attn.c_attn.weight"] + w[f"h.{l}.attn.c_attn.bias"]
        q, key, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=-1))
        scores = (q @ key.transpose(-2, -1) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
        if kind == BLUR:
            scores = blur(scores, width, sigma)
        else:
            dropped = factors(seed, step, first_row, rate, SCORES, l, NH, T) == 0
            scores = drop_largest(scores, dropped, k, masks)
        weights = torch.softmax(scores, dim=-1) * factors(seed, step, first_row, attn, ATTN, l, NH,
            T)
        out = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return out @ w[f"h.{l}.attn.c_proj.weight"] + w[f"h.{l}.attn.c_proj.bias"]

    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:T]
    for l in range(L):
        a = attention_branch(l, x)
        if tied:
            x = x + factor[2 * l] * (a + mlp_branch(w, l, x + a))
        else:
            x = x + factor[2 * l] * a
            x = x + factor[2 * l + 1] * mlp_branch(w, l, x)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def edited_case(params, tokens, targets, name):
    case, *noise, sigma = EDITED[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    logits = edited_logits(w, tokens, name).reshape(-1, V)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long().reshape(-1))
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/noise": np.array(noise, np.int64), f"{name}/sigma": np.array([sigma]),
           f"{name}/loss": loss.detach().numpy()}
    store_gradients(out, name, w)
    return out


def main():
    torch.set_num_threads(1)                       # one order of summation
    params, tokens, targets = read_golden()
    out = {}
    for name in EDITED:
        out |= edited_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}")
    write(out, "attention.safetensors", __doc__)


if __name__ == "__main__":
    main()
