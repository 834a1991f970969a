"""Writes golden.safetensors: reference tensors for the engines' tests, from an independent
implementation.

Run:    python3 dev/golden/make_golden.py [OUTPUT]   (default: golden.safetensors, here)
Needs:  pip install torch numpy safetensors          (and transformers, to check the full model)

GPT-2 in PyTorch, float64, on one CPU thread. Drop path is applied naively: every branch is computed
on every row, then multiplied by mask * scale. An engine, which computes only the kept rows, must
get the same results. README.md lists the tensors. Two runs write identical files.
"""
import math
import os
import pathlib
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import torch
from safetensors.numpy import load_file, save_file

V, L, NH, C = 37, 3, 2, 12      # odd on purpose: no size is a multiple of what kernels favour
POSITIONS, B, T = 8, 3, 7       # T < POSITIONS: the last row of wpe is never used; its gradient is
                                # zero
STEPS, MICRO = 10, 2            # optimizer steps of the training run, micro-batches per step

LR = [0.0025, 0.005, 0.0075, 0.01, 0.0095, 0.008, 0.006, 0.004, 0.0025, 0.0015]
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.1
CLIP = 1.35                     # about half of the run's gradient norms are larger; asserted in
                                # train()

ATTN_PARAMS = {"ln_1.weight": (C,), "ln_1.bias": (C,),
               "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
               "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,)}
MLP_PARAMS = {"ln_2.weight": (C,), "ln_2.bias": (C,),
              "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
              "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}


def branch_params(branch):
    """Names of the parameters of branch 2*l + j of layer l; j = 0 is attention, 1 the MLP."""
    return [f"h.{branch // 2}.{name}" for name in (ATTN_PARAMS, MLP_PARAMS)[branch % 2]]


# ---- The model ----

def random_params(rng):
    """Far larger than GPT-2's initial weights, so that no gradient is small. Exact in float32:
    every engine starts from equal weights."""
    shapes = {"wte.weight": (V, C), "wpe.weight": (POSITIONS, C)}
    for l in range(L):
        shapes |= {f"h.{l}.{name}": shape for name, shape in (ATTN_PARAMS | MLP_PARAMS).items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}

    params = {}
    for name, shape in shapes.items():
        normal = rng.standard_normal(shape)
        if len(shape) == 2:
            value = 0.3 * normal
        elif "ln_" in name and name.endswith("weight"):
            value = 1 + 0.2 * normal
        else:
            value = 0.2 * normal
        params[name] = value.astype(np.float32).astype(np.float64)
    return params


def layernorm(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered ** 2).mean(-1, keepdim=True)
    return centered / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention_branch(w, l, x):
    """x (B,T,C) -> (B,T,C), LayerNorm included."""
    rows, length, _ = x.shape
    h = layernorm(x, w[f"h.{l}.ln_1.weight"], w[f"h.{l}.ln_1.bias"])
    qkv = h @ w[f"h.{l}.attn.c_attn.weight"] + w[f"h.{l}.attn.c_attn.bias"]
    # (B,NH,T,HS)
    q, k, v = (part.view(rows, length, NH, C // NH).transpose(1, 2) for part in qkv.split(C,
        dim=-1))
    # (B,NH,T,T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(C // NH)
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(rows, length, C)
    return out @ w[f"h.{l}.attn.c_proj.weight"] + w[f"h.{l}.attn.c_proj.bias"]


def mlp_branch(w, l, x):
    """x (B,T,C) -> (B,T,C), LayerNorm included."""
    h = layernorm(x, w[f"h.{l}.ln_2.weight"], w[f"h.{l}.ln_2.bias"])
    h = gelu(h @ w[f"h.{l}.mlp.c_fc.weight"] + w[f"h.{l}.mlp.c_fc.bias"])
    return h @ w[f"h.{l}.mlp.c_proj.weight"] + w[f"h.{l}.mlp.c_proj.bias"]


def logits_of(w, tokens, kept, scale, tied=False):
    """tokens (B,T), kept (2L,B) of 0 and 1, scale (2L) -> logits (B,T,V)."""
    # (2L,B,1,1)
    factor = (torch.from_numpy(kept) * torch.from_numpy(scale)[:, None])[:, :, None, None]
    x = w["wte.weight"][torch.from_numpy(tokens).long()] + w["wpe.weight"][:tokens.shape[1]]
    for l in range(L):
        if tied:
            a = attention_branch(w, l, x)
            x = x + factor[2 * l] * (a + mlp_branch(w, l, x + a))
        else:
            x = x + factor[2 * l] * attention_branch(w, l, x)
            x = x + factor[2 * l + 1] * mlp_branch(w, l, x)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def losses_of(logits, targets):
    """Cross entropy in nats (B,T), zero if the target is negative; and its mean over the other
    targets."""
    targets = torch.from_numpy(targets).long()
    counted = targets >= 0
    picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = (torch.logsumexp(logits, dim=-1) - picked) * counted
    return losses, losses.sum() / counted.sum()


def leaves(params):
    return {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}


# ---- Evaluation and gradients ----

def whole(branches):
    """One decision per branch, the same for all rows: (2L) -> (2L,B)."""
    return np.repeat(np.array(branches, np.int32)[:, None], B, axis=1)


ROWS = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], np.int32)
ROWS_TIED = np.repeat(np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0]], np.int32), 2, axis=0)
RATES = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5])

# name: kept (2L,B), scale (2L), tied
CASES = {
    "full":     (whole([1, 1, 1, 1, 1, 1]), np.ones(2 * L), False),
    "batch":    (whole([1, 0, 1, 1, 0, 1]), 1 / (1 - RATES), False),
    "row":      (ROWS, 1 / (1 - RATES), False),
    "tied_row": (ROWS_TIED, np.array([1.25, 1.25, 1.5, 1.5, 2.0, 2.0]), True),
    "none":     (whole([0, 0, 0, 0, 0, 0]), 1 / (1 - RATES), False),
}


def evaluation(params, tokens, targets):
    kept, scale, _ = CASES["full"]
    with torch.no_grad():
        logits = logits_of(leaves(params), tokens, kept, scale)
        losses, loss = losses_of(logits, targets)
        ignoring = targets.copy()
        ignoring[0, 0] = ignoring[0, 3] = ignoring[2, 6] = -1
        ignoring[1, :] = -1
        _, ignoring_loss = losses_of(logits, ignoring)
    return {"eval/logits": logits.numpy(), "eval/losses": losses.numpy(), "eval/loss": loss.numpy(),
            "eval_ignore/targets": ignoring, "eval_ignore/loss": ignoring_loss.numpy()}


def gradient_case(params, tokens, targets, name):
    kept, scale, tied = CASES[name]
    w = leaves(params)
    _, loss = losses_of(logits_of(w, tokens, kept, scale, tied), targets)
    loss.backward()
    out = {f"{name}/kept": kept, f"{name}/scale": scale, f"{name}/tied": np.array([tied], np.int32),
           f"{name}/loss": loss.detach().numpy()}
    for parameter, value in w.items():
        if value.grad.any():                       # identically zero: not stored
            out[f"{name}/grad/{parameter}"] = value.grad.numpy()
    return out


# ---- Training ----

def training_data(rng):
    """Random tokens and plans. Steps 0-4 drop whole branches, steps 5-9 rows; branches in `gone`
    are dropped throughout a step."""
    gone = {0: [5], 2: [3, 4], 3: [3], 6: [5], 7: [0, 4], 9: [1]}
    # 0.06 to 0.48: rising with depth and step
    rates = np.linspace(0.02, 0.06, STEPS)[:, None, None] * np.arange(3, 2 * L + 3)
    # (STEPS,MICRO,2L)
    rates = np.repeat(rates, MICRO, axis=1)
    kept = (rng.random((STEPS, MICRO, 2 * L, B)) >= rates[..., None]).astype(np.int32)
    kept[:5] = kept[:5, :, :, :1]
    for step, branches in gone.items():
        kept[step, :, branches] = 0
    tokens = rng.integers(0, V, (STEPS, MICRO, B, T + 1), dtype=np.int32)
    return {"train/tokens": tokens[..., :-1].copy(), "train/targets": tokens[..., 1:].copy(),
            "train/kept": kept, "train/scale": 1 / (1 - rates)}


def adamw(w):
    groups = [{"params": [p for p in w.values() if p.dim() == 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in w.values() if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS)


def train(params, data, skip):
    """skip: a branch that no row of a step runs has no gradient (None), and AdamW skips it;
    otherwise a zero one."""
    w = leaves(params)
    optimizer = adamw(w)
    step_losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_loss = 0.0
        for m in range(MICRO):
            logits = logits_of(w, data["train/tokens"][step, m], data["train/kept"][step, m],
                               data["train/scale"][step, m])
            loss = losses_of(logits, data["train/targets"][step, m])[1] / MICRO
            loss.backward()
            mean_loss += loss.item()
        for branch in range(2 * L):
            if not data["train/kept"][step, :, branch].any():
                for name in branch_params(branch):
                    assert not w[name].grad.any()
                    if skip:
                        w[name].grad = None
        norms.append(torch.nn.utils.clip_grad_norm_(w.values(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = LR[step]
        optimizer.step()
        step_losses.append(mean_loss)
    clipped = [norm > CLIP for norm in norms]
    assert 3 <= sum(clipped) <= 7 and all(abs(norm / CLIP - 1) > 0.01 for norm in norms), norms
    kind = "train_skip" if skip else "train_dense"
    out = {f"{kind}/param/{name}": value.detach().numpy() for name, value in w.items()}
    return out | {f"{kind}/loss": np.array(step_losses), f"{kind}/norm": np.array(norms)}


# ---- The check against transformers, and the file ----

def check_against_transformers(params, tokens, logits):
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("transformers is not installed: the undropped model was not checked against it")
        return
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=POSITIONS, n_embd=C, n_layer=L,
                                       n_head=NH,
                                       activation_function="gelu_new", layer_norm_epsilon=1e-5,
                                       bos_token_id=0,
                                       eos_token_id=0, attn_implementation="eager")).double().eval()
    model.transformer.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    error = np.abs(theirs - logits).max()
    print(f"largest difference of a logit from transformers' GPT2LMHeadModel: {error:.1e}")
    assert error < 1e-12


def read_golden():
    """What this script wrote: the parameters by name, tokens and targets."""
    golden = load_file(pathlib.Path(__file__).with_name("golden.safetensors"))
    params = {name.removeprefix("param/"): value for name, value in golden.items()
              if name.startswith("param/")}
    return params, golden["tokens"], golden["targets"]


def store_gradients(out, name, w):
    """Adds the gradients of the leaves w to a case; those that are identically zero are not
    stored."""
    for parameter, value in w.items():
        if value.grad.any():
            out[f"{name}/grad/{parameter}"] = value.grad.numpy()


def write(tensors, name, usage):
    """Writes to the file given on the command line, else to `name` in this directory."""
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(usage)
    path = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name(name)
    save_file({name: np.ascontiguousarray(np.atleast_1d(value)) for name, value in tensors.items()},
              path)
    print(f"wrote {path}: {len(tensors)} tensors, {pathlib.Path(path).stat().st_size} bytes")


def main():
    torch.set_num_threads(1)                       # one order of summation
    rng = np.random.default_rng(20240520)
    params = random_params(rng)
    tokens = rng.integers(0, V, (B, T), dtype=np.int32)
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    data = training_data(rng)

    out = {f"param/{name}": value for name, value in params.items()}
    out |= {"config": np.array([V, POSITIONS, L, NH, C], np.int32), "tokens": tokens,
            "targets": targets}
    out |= evaluation(params, tokens, targets)
    check_against_transformers(params, tokens, out["eval/logits"])
    for name in CASES:
        out |= gradient_case(params, tokens, targets, name)
        print(f"{name}: loss {out[f'{name}/loss']:.6f}")
    out |= data
    out |= {"train/lr": np.array(LR), "train/beta1": np.array([BETA1]),
            "train/beta2": np.array([BETA2]),
            "train/eps": np.array([EPS]), "train/weight_decay": np.array([WEIGHT_DECAY]),
            "train/clip": np.array([CLIP])}
    for skip in (False, True):
        trained = train(params, data, skip)
        out |= trained
        print("\n".join(f"{name}: {' '.join(f'{x:.4f}' for x in trained[name])}" for name in trained
                        if "param" not in name))

    write(out, "golden.safetensors", __doc__)


if __name__ == "__main__":
    main()
