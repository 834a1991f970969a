"""Writes exits.safetensors: losses and gradients with early exits (LayerSkip) in float64.

Run:    python3 dev/golden/make_exits.py [OUTPUT]    (default: exits.safetensors here)
Needs:  pip install torch numpy safetensors

The model, weights, tokens and plans are those of make_golden.py. The stream is read after each
layer through the same ln_f and head, by torch's cross_entropy, and the losses are added with the
weights of a case: LayerSkip's (Elhoushi et al. 2024, equation 6), or others, in which layer 0 has
an exit, too. README.md lists the tensors.
"""
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402

from make_golden import (  # noqa: E402
    CASES, L, V, attention_branch, layernorm, leaves, mlp_branch, read_golden,
    store_gradients, write)


def layerskip(scale, enabled):
    """Equation 6, normalized over the enabled exits; the last layer always is."""
    e = [scale * sum(range(l + 1)) if l < L - 1 else L - 1 + scale * sum(range(L - 1))
         for l in range(L)]
    e = np.array([x if l in enabled or l == L - 1 else 0 for l, x in enumerate(e)])
    return e / e.sum()


# name: (plan of make_golden.py, weights by layer, label smoothing)
EXITS = {
    "full": ("full", layerskip(0.5, {1}), 0.0),
    "row": ("row", np.array([0.2, 0.3, 0.5]), 0.1),
    "batch": ("batch", np.array([0.6, 0.0, 1.4]), 0.0),
    "tied": ("tied_row", np.array([0.25, 0.5, 0.25]), 0.2),
    "none": ("none", layerskip(1.0, {0, 1}), 0.0),
}


def streams(w, tokens, case):
    """The stream after each layer, (B,T,C)."""
    kept, scale, tied = CASES[case]
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:tokens.shape[1]]
    for l in range(L):
        if tied:
            a = attention_branch(w, l, x)
            x = x + factor[2 * l] * (a + mlp_branch(w, l, x + a))
        else:
            x = x + factor[2 * l] * attention_branch(w, l, x)
            x = x + factor[2 * l + 1] * mlp_branch(w, l, x)
        yield x


def exits_case(params, tokens, targets, name):
    case, weights, smoothing = EXITS[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    wanted = torch.from_numpy(targets).long().reshape(-1)
    loss, losses = 0, []
    for l, x in enumerate(streams(w, tokens, case)):
        logits = layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T
        logits = logits.reshape(-1, V)
        loss = loss + weights[l] * torch.nn.functional.cross_entropy(logits, wanted,
                                                                     label_smoothing=smoothing)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted).item())
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/weights": weights, f"{name}/smoothing": np.array([smoothing]),
           f"{name}/loss": loss.detach().numpy(), f"{name}/nll": np.array(losses)}
    store_gradients(out, name, w)
    return out


def main():
    torch.set_num_threads(1)                       # one order of summation
    params, tokens, targets = read_golden()
    out = {}
    for name in EXITS:
        out |= exits_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}, -log p by exit {out[f'{name}/nll']}")
    write(out, "exits.safetensors", __doc__)


if __name__ == "__main__":
    main()
