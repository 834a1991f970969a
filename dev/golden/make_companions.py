"""Writes companions.safetensors: like golden.safetensors, for the regularizers beside drop path.

Run:    python3 dev/golden/make_companions.py [OUTPUT]     (default: companions.safetensors here)
Needs:  pip install torch numpy safetensors

The model, weights and tokens are those of make_golden.py. Dropout's masks come from a Philox
written here in numpy, after the paper (Salmon, Moraes, Dror, Shaw 2011) and the description in
dev/model/noise.h; torch only gets the factors. The smoothed loss is torch's own
cross_entropy(label_smoothing=). README.md lists the tensors.
"""
import math
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch  # noqa: E402

from make_golden import (B, C, CASES, L, NH, T, V, gelu, layernorm, leaves,  # noqa: E402
                         read_golden, store_gradients, write)

STREAM_NOISE = 8
EMBD, ATTN, ATTN_OUT, MLP_OUT = range(4)

# name: (plan of make_golden.py, seed, step, first row, rates of embd, attn, resid in 2^-16, label
# smoothing)
NOISY = {
    "smoothed": ("row", 0, 0, 0, 0, 0, 0, 0.1),
    "dropout": ("full", 77, 3, 0, 6554, 6554, 6554, 0.0),
    "both": ("row", (5 << 32) + 1, (1 << 33) + 7, 1000, 13107, 20000, 9000, 0.2),
    "tied": ("tied_row", 9, 12, 6, 3277, 13107, 6554, 0.1),
}


# ---- Philox4x32-10 ----

def philox(counter, key):
    """counter: four arrays of equal shape, key: two numbers -> (shape, 4) uint32."""
    c = [np.asarray(x, np.uint64) & 0xFFFFFFFF for x in np.broadcast_arrays(*counter)]
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & np.uint64(0xFFFFFFFF),
             (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & np.uint64(0xFFFFFFFF)]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def check_philox():
    """Checks the first and last known answers of Random123's kat_vectors."""
    assert [f"{x:08x}" for x in philox([0] * 4, [0, 0])] == ["6627e8d5", "e169c58d", "bc57ac4c",
        "9b00dbd8"]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert [f"{x:08x}" for x in philox(counter, key)] == ["d16cfe09", "94fdcceb", "5001e420",
        "24126ea1"]


def factors(seed, step, first_row, rate, place, layer, heads, elements):
    """(B, heads, T, elements): 0, or 1/(1-p) if an element is kept."""
    if rate == 0:
        return torch.ones(B, heads, T, elements, dtype=torch.float64)
    stream = ((step >> 32) << 8) | STREAM_NOISE
    key = philox([layer, place, step & 0xFFFFFFFF, stream], [seed & 0xFFFFFFFF, seed >> 32])[:2]
    row, head, line, element = np.ix_(np.arange(B) + first_row, np.arange(heads), np.arange(T),
                                      np.arange(elements))
    words = philox([element // 8, line, head, row], key)
    half = np.broadcast_to(element % 8, words.shape[:-1])
    word = np.take_along_axis(words, (half // 2)[..., None], -1)[..., 0]
    kept = (word >> (16 * (half % 2)).astype(np.uint32) & 0xFFFF) >= rate
    return torch.from_numpy(kept * (65536 / (65536 - rate)))


# ---- GPT-2 with dropout, where transformers' GPT2Model applies it ----

def logits_of(w, tokens, case, noise):
    kept, scale, tied = CASES[case]
    seed, step, first_row, embd, attn, resid = noise
    # (2L,B,1,1)
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)

    # x (B,T,C)
    def dropped(x, rate, place, layer):
        return x * factors(seed, step, first_row, rate, place, layer, 1, C)[:, 0]

    def attention_branch(l, x):
        h = layernorm(x, w[f"h.{l}.ln_1.weight"], w[f"h.{l}.ln_1.bias"])
        qkv = h @ w[f"h.{l}.attn.c_attn.weight"] + w[f"h.{l}.attn.c_attn.bias"]
        q, k, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=-1))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
        weights = torch.softmax(scores, dim=-1) * factors(seed, step, first_row, attn, ATTN, l, NH,
            T)
        out = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return dropped(out @ w[f"h.{l}.attn.c_proj.weight"] + w[f"h.{l}.attn.c_proj.bias"], resid,
                       ATTN_OUT, l)

    def mlp_branch(l, x):
        h = layernorm(x, w[f"h.{l}.ln_2.weight"], w[f"h.{l}.ln_2.bias"])
        h = gelu(h @ w[f"h.{l}.mlp.c_fc.weight"] + w[f"h.{l}.mlp.c_fc.bias"])
        return dropped(h @ w[f"h.{l}.mlp.c_proj.weight"] + w[f"h.{l}.mlp.c_proj.bias"], resid,
                       MLP_OUT, l)

    x = dropped(w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:T], embd, EMBD,
                0)
    for l in range(L):
        if tied:
            a = attention_branch(l, x)
            x = x + factor[2 * l] * (a + mlp_branch(l, x + a))
        else:
            x = x + factor[2 * l] * attention_branch(l, x)
            x = x + factor[2 * l + 1] * mlp_branch(l, x)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def noisy_case(params, tokens, targets, name):
    case, *noise, smoothing = NOISY[name]
    kept, scale, tied = CASES[case]
    w = leaves(params)
    logits, wanted = logits_of(w, tokens, case, noise).reshape(-1,
        V), torch.from_numpy(targets).long().reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=smoothing)
    nll = torch.nn.functional.cross_entropy(logits, wanted)
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/noise": np.array(noise, np.int64), f"{name}/smoothing": np.array([smoothing]),
           f"{name}/loss": loss.detach().numpy(), f"{name}/nll": nll.detach().numpy()}
    store_gradients(out, name, w)
    return out


def main():
    torch.set_num_threads(1)                       # one order of summation
    check_philox()
    params, tokens, targets = read_golden()
    out = {}
    for name in NOISY:
        out |= noisy_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}, -log p {out[f'{name}/nll']:.6f}")
    write(out, "companions.safetensors", __doc__)


if __name__ == "__main__":
    main()
