"""Writes teacher.safetensors: like golden.safetensors, for losses that have a teacher.

Run:    python3 dev/golden/make_teacher.py [OUTPUT]     (default: teacher.safetensors here)
Needs:  pip install torch numpy safetensors

The student, its weights, plans and tokens are those of make_golden.py. The teacher is made of the
same tensors: the last layer alone, between the same embeddings and head. The divergence is torch's
own kl_div. Attention maps of two of the student's layers are compared with that layer's. README.md
lists the tensors.
"""
import math
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import cross_entropy, kl_div, log_softmax  # noqa: E402

from make_companions import logits_of  # noqa: E402
from make_golden import (B, C, CASES, L, NH, T, V, attention_branch, layernorm,  # noqa: E402
                         leaves, mlp_branch, read_golden, store_gradients, write)

QUIET = (0, 0, 0, 0, 0, 0)                         # no dropout

# name: (plan of make_golden.py, label smoothing, share of the loss, temperature)
TAUGHT = {
    "half": ("row", 0.0, 0.5, 1.0),
    "soft": ("tied_row", 0.0, 1.0, 2.0),
    "smooth": ("full", 0.1, 0.25, 0.5),
}


def teacher_logits(w, tokens):
    """Of the model whose only layer is the student's last one."""
    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:tokens.shape[1]]
    x = x + attention_branch(w, L - 1, x)
    x = x + mlp_branch(w, L - 1, x)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def taught_case(params, tokens, targets, name):
    case, smoothing, share, temperature = TAUGHT[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    student = logits_of(w, tokens, case, QUIET).reshape(-1, V)
    with torch.no_grad():
        teacher = teacher_logits(w, tokens).reshape(-1, V)
    wanted = torch.from_numpy(targets).long().reshape(-1)
    hard = cross_entropy(student, wanted, label_smoothing=smoothing)
    distill = temperature ** 2 * kl_div(log_softmax(student / temperature, -1),
                                        log_softmax(teacher / temperature, -1),
                                        reduction="batchmean", log_target=True)
    loss = (1 - share) * hard + share * distill
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/objective": np.array([smoothing, share, temperature]),
           f"{name}/loss": loss.detach().numpy(), f"{name}/distill": distill.detach().numpy()}
    store_gradients(out, name, w)
    return out


# name: (plan, weight of the distance, whether it is a divergence)
ALIGNED = {"cosine": ("row", 2.0, False), "kl": ("tied_row", 0.7, True)}
COMPARED = (0, L - 1)                              # layers of the student


def attention_map(w, l, x):
    """(B,T,T): the mean of the heads' probabilities in layer l, which reads x (B,T,C)."""
    h = layernorm(x, w[f"h.{l}.ln_1.weight"], w[f"h.{l}.ln_1.bias"])
    qkv = h @ w[f"h.{l}.attn.c_attn.weight"] + w[f"h.{l}.attn.c_attn.bias"]
    q, k, _ = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=-1))
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
    return torch.softmax(scores, dim=-1).mean(1)


def aligned_case(params, tokens, targets, name):
    case, gamma, divergence = ALIGNED[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:T]
    with torch.no_grad():
        teacher = attention_map(w, L - 1, x)[:, 1:]
    align, cosines, compared = 0.0, 0.0, 0
    for l in range(L):
        if l in COMPARED:
            student = attention_map(w, l, x)[:, 1:]
            cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
            # keys that no query sees have no part: 0 log 0 has a gradient that is not a number
            apart = torch.special.xlogy(teacher, teacher) - torch.special.xlogy(
                teacher, torch.where(student > 0, student, 1.0))
            distance = apart.sum(-1) if divergence else 2 - 2 * cosine
            align = align + (factor[2 * l, :, :, 0] * distance).sum()
            rows = torch.from_numpy(kept[2 * l]).double()[:, None]
            cosines, compared = cosines + (rows * cosine).sum(), compared + kept[2 * l].sum() * (
                T - 1)
        a = attention_branch(w, l, x)
        if tied:
            x = x + factor[2 * l] * (a + mlp_branch(w, l, x + a))
        else:
            x = x + factor[2 * l] * a
            x = x + factor[2 * l + 1] * mlp_branch(w, l, x)
    logits = layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T
    align = align / (B * len(COMPARED) * (T - 1))
    loss = gamma * align + cross_entropy(logits.reshape(-1, V),
                                         torch.from_numpy(targets).long().reshape(-1))
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/gamma": np.array([gamma]), f"{name}/loss": loss.detach().numpy(),
           f"{name}/align": np.array([align.item(), cosines.item() / compared])}
    store_gradients(out, name, w)
    return out


# name: (plan, weight of the distance of attributions)
ATTRIBUTED = {"attribution": ("row", 0.8)}


def attributed_case(params, tokens, targets, name):
    """By double backpropagation. The target is a row of numbers for each row of tokens."""
    case, gamma = ATTRIBUTED[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    e = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:T]
    x = e
    for l in range(L):
        x = x + factor[2 * l] * attention_branch(w, l, x)
        x = x + factor[2 * l + 1] * mlp_branch(w, l, x)
    logits = layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T
    nll = cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).long().reshape(-1))
    gradient, = torch.autograd.grad(nll, e, create_graph=True)
    a = (gradient * e.detach()).sum(-1)            # e counts as data
    wanted = torch.from_numpy(np.random.default_rng(3).normal(size=(B, T)))
    cosine = torch.nn.functional.cosine_similarity(a, wanted, dim=-1)
    loss = nll + gamma * (2 - 2 * cosine).mean()
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/gamma": np.array([gamma]), f"{name}/target": wanted.numpy(),
           f"{name}/loss": loss.detach().numpy(), f"{name}/cosine": cosine.mean().detach().numpy()}
    store_gradients(out, name, w)
    return out


def main():
    torch.set_num_threads(1)                       # one order of summation
    params, tokens, targets = read_golden()
    out = {}
    for name in TAUGHT:
        out |= taught_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}, distill {out[f'{name}/distill']:.6f}")
    for name in ALIGNED:
        out |= aligned_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}, align, cosine {out[f'{name}/align']}")
    for name in ATTRIBUTED:
        out |= attributed_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}, cosine {out[f'{name}/cosine']:.6f}")
    write(out, "teacher.safetensors", __doc__)


if __name__ == "__main__":
    main()
