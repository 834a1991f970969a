"""Writes lora.safetensors: losses and gradients of adapters (LoRA) in float64.

Run:    python3 dev/golden/make_lora.py [OUTPUT]     (default: lora.safetensors here)
Needs:  pip install torch numpy safetensors

The model, weights and tokens are those of make_golden.py, with an adapter beside each product:
y = x W + b + s (D(x) A^T) B^T. Dropout's masks are those of make_companions.py, at the places
4 .. 7 of dev/model/noise.h. README.md lists the tensors.
"""
import math
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402

from make_companions import check_philox, factors  # noqa: E402
from make_golden import (B, C, CASES, L, NH, T, V, gelu, layernorm,  # noqa: E402
                         read_golden, store_gradients, write)

RANK, SCALE, PLACE = 3, 2.0, 4
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

# name: (plan of make_golden.py, whether the norms train, seed, step, first row, rate in 2^-16)
ADAPTED = {
    "full": ("full", False, 0, 0, 0, 0),
    "row": ("row", True, 31, (1 << 32) + 5, 40, 16384),
    "tied": ("tied_row", False, 12, 3, 1, 9830),
}


def adapters(params):
    """A and B of every product, far from their initial values, exact in float32."""
    rng = np.random.default_rng(17)
    out = {}
    for l in range(L):
        for target in TARGETS:
            inputs, outputs = params[f"h.{l}.{target}.weight"].shape
            for letter, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                value = rng.standard_normal(shape) / math.sqrt(shape[1])
                out[f"h.{l}.{target}.lora_{letter}.weight"] = value.astype(np.float32)
    return out


def logits_of(w, tokens, case, noise):
    kept, scale, tied = CASES[case]
    seed, step, first_row, rate = noise
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)

    def product(l, target, x):
        name = f"h.{l}.{target}"
        place = PLACE + TARGETS.index(target)
        seen = x * factors(seed, step, first_row, rate, place, l, 1, x.shape[-1])[:, 0]
        low = seen @ w[f"{name}.lora_A.weight"].T @ w[f"{name}.lora_B.weight"].T
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"] + SCALE * low

    def attention_branch(l, x):
        h = layernorm(x, w[f"h.{l}.ln_1.weight"], w[f"h.{l}.ln_1.bias"])
        parts = product(l, "attn.c_attn", h).split(C, dim=-1)
        q, k, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
        out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, T, C)
        return product(l, "attn.c_proj", out)

    def mlp_branch(l, x):
        h = layernorm(x, w[f"h.{l}.ln_2.weight"], w[f"h.{l}.ln_2.bias"])
        return product(l, "mlp.c_proj", gelu(product(l, "mlp.c_fc", h)))

    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:T]
    for l in range(L):
        if tied:
            a = attention_branch(l, x)
            x = x + factor[2 * l] * (a + mlp_branch(l, x + a))
        else:
            x = x + factor[2 * l] * attention_branch(l, x)
            x = x + factor[2 * l + 1] * mlp_branch(l, x)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def adapted_case(params, added, tokens, targets, name):
    case, norms, *noise = ADAPTED[name]
    kept, scale, tied = CASES[case]
    trained = [key for key in (*params, *added) if "lora_" in key or (norms and "ln_" in key)]
    w = {key: torch.tensor(np.asarray(value, np.float64), requires_grad=key in trained)
         for key, value in (params | added).items()}
    logits = logits_of(w, tokens, case, noise).reshape(-1, V)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long().reshape(-1))
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/noise": np.array(noise, np.int64), f"{name}/norms": np.array([norms], np.int32),
           f"{name}/loss": loss.detach().numpy()}
    store_gradients(out, name, {key: w[key] for key in trained if w[key].grad is not None})
    return out


def main():
    torch.set_num_threads(1)                       # one order of summation
    check_philox()
    params, tokens, targets = read_golden()
    added = adapters(params)
    out = {f"param/{name}": value for name, value in added.items()}
    for name in ADAPTED:
        out |= adapted_case(params, added, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}")
    write(out, "lora.safetensors", __doc__)


if __name__ == "__main__":
    main()
