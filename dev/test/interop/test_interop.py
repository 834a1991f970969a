"""Our checkpoints in transformers, and its checkpoints in our programs.

Run:    make test-interop, or some of the methods below:
        dev/test/interop/run.sh Logits Training.test_rows
Needs:  torch, numpy, transformers, safetensors, peft, in the virtual environment that run.sh makes

Weights are random and large, sizes are odd. The reference is transformers' GPT2LMHeadModel in
double precision. Our fp32 may differ from it by fp32's rounding: transformers' own fp32 gives the
scale, if available.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

BUILD = os.environ.get("BUILD", "build")
SIZES = [dict(V=61, T=17, C=24, L=3, NH=3), dict(V=257, T=33, C=20, L=2, NH=5),
         dict(V=1003, T=40, C=72, L=1, NH=4)]
LLMC_MAGIC, LLMC_VERSION = 20240326, {"float32": 3, "bfloat16": 5}


# ---- Models, tokens, programs ----

def random_model(V, T, C, L, NH, seed=1):
    """Matrices of 0.15, so that no logit and no gradient is small; LayerNorms near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=NH,
                                       bos_token_id=0,
                                       eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
                                       attn_pdrop=0.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator) + ("ln_" in name
                and name.endswith("weight")))
    return model.eval()


def random_tokens(B, T, V, seed=2):
    return np.random.default_rng(seed).integers(0, V, (B, T), dtype=np.int32)


def run(program, *arguments):
    """Runs a program of ours; its standard output."""
    done = subprocess.run([f"{BUILD}/{program}", *map(str, arguments)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{program} {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def our_logits(checkpoint, tokens, folder):
    B, T = tokens.shape
    tokens.tofile(folder / "tokens.i32")
    run("interop_logits", checkpoint, B, T, folder / "tokens.i32", folder / "logits.f32")
    return np.fromfile(folder / "logits.f32", np.float32).reshape(B, T, -1)


def their_logits(model, tokens, dtype=torch.float64):
    with torch.no_grad():
        return model.to(dtype)(torch.from_numpy(tokens).long()).logits.double().numpy()


def load(folder):
    """A model as from_pretrained loads it: nothing missing, nothing left over."""
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{folder}: {kind}: {info[kind]}"
    return model.eval()


def write_shard(path, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


# ---- llm.c's format, written and read without a line of ours ----

def llmc_order(L):
    """Names in the file's order, and whether the matrix is the transpose of Hugging Face's."""
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layer = [f"h.{l}.{part}.{kind}" for part in parts for kind in ("weight", "bias")
             for l in range(L)]
    names = ["wte.weight", "wpe.weight", *layer, "ln_f.weight", "ln_f.bias"]
    return [(name, ".c_" in name and name.endswith("weight")) for name in names]


def llmc_write(path, model, dtype):
    c, weights = model.config, model.transformer.state_dict()
    Vp = -(-c.vocab_size // 128) * 128
    header = np.zeros(256, np.int32)
    header[:8] = (LLMC_MAGIC, LLMC_VERSION[dtype], c.n_positions, c.vocab_size, c.n_layer, c.n_head,
                  c.n_embd, Vp)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name, transposed in llmc_order(c.n_layer):
            w = weights[name].T if transposed else weights[name]
            if name == "wte.weight":
                w = torch.nn.functional.pad(w, (0, 0, 0, Vp - c.vocab_size))
            w = w.contiguous().to(getattr(torch, dtype))
            file.write(w.view(torch.int16 if dtype == "bfloat16"
                              else torch.int32).numpy().tobytes())


def llmc_read(path):
    """The model of transformers that the file is."""
    header = np.fromfile(path, np.int32, 256)
    assert header[0] == LLMC_MAGIC and not header[8:].any()
    T, V, L, NH, C, Vp = map(int, header[2:8])
    assert Vp % 128 == 0 and 0 <= Vp - V < 128
    model = random_model(V, T, C, L, NH)
    weights = model.transformer.state_dict()
    integer, real = {3: (np.int32, torch.float32), 5: (np.int16, torch.bfloat16)}[int(header[1])]
    flat = torch.from_numpy(np.fromfile(path, integer, offset=1024)).view(real).float()
    for name, transposed in llmc_order(L):
        shape = [Vp, C] if name == "wte.weight" else list(weights[name].shape)[::-1 if transposed
            else 1]
        count = int(np.prod(shape))
        w, flat = flat[:count].view(shape), flat[count:]
        if name == "wte.weight":
            assert not w[V:].any(), "padding is not zero"
            w = w[:V]
        weights[name].copy_(w.T if transposed else w)
    assert not len(flat), "numbers are left over"
    return model


# ---- The order of samples, as data/README.md says, and Philox ----

def philox(counter, key):
    """Salmon et al. 2011: Philox4x32-10."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def window_of(sample, n, seed):
    """The window that is sample i: a Feistel network of eight rounds on the place in the epoch,
    until it is below n."""
    epoch, x = divmod(sample, n)
    h = 0
    while 1 << 2 * h < n:
        h += 1
    while True:
        left, right = x >> h, x & ((1 << h) - 1)
        for i in range(8):
            word = philox((right, i, epoch, 2), (seed, 0))[0]
            left, right = right, left ^ (word & ((1 << h) - 1))
        x = left << h | right
        if x < n:
            return x


class Interop(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="droppath_interop_")
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name)

    def assert_logits(self, got, want, single=None, what=""):
        """got is fp32's; want is exact. single: what another fp32 program gets, ten times whose
        error is allowed."""
        error, scale = np.abs(got - want).max(), np.abs(want).max()
        allowed = 1e-5 * scale if single is None else 10 * np.abs(single -
            want).max() + 1e-6 * scale
        self.assertLessEqual(error, allowed, f"{what}: of logits up to {scale:.3g}")
        self.assertGreater(scale, 1, "these logits would hide an error")


class Logits(Interop):
    def check_theirs(self, model, saved, what):
        tokens = random_tokens(3, model.config.n_positions, model.config.vocab_size)
        single = their_logits(model, tokens, torch.float32)
        self.assert_logits(our_logits(saved, tokens, self.folder), their_logits(model, tokens),
                           single, what)

    def test_theirs_in_ours(self):
        """Saved by save_pretrained in three dtypes, whole and in shards, with and without the
        head's prefix."""
        for i, size in enumerate(SIZES):
            for dtype in ("float32", "float16", "bfloat16"):
                model = random_model(**size, seed=i).to(getattr(torch, dtype))
                whole, shards, bare = (self.folder / f"{i}_{dtype}_{kind}" for kind in ("whole",
                    "shards", "bare"))
                model.save_pretrained(whole)
                model.save_pretrained(shards, max_shard_size="20KB")
                model.transformer.save_pretrained(bare)
                self.assertGreater(len(list(shards.glob("model-*-of-*.safetensors"))), 1)
                self.assertFalse((shards / "model.safetensors").exists())
                for saved in (whole, shards, bare):
                    self.check_theirs(model, saved, saved.name)

    def test_llmc_in_ours(self):
        for i, size in enumerate(SIZES):
            for dtype in ("float32", "bfloat16"):
                model = random_model(**size, seed=i).to(getattr(torch, dtype)).float()
                llmc_write(self.folder / "model.bin", model, dtype)
                self.check_theirs(model, self.folder / "model.bin", f"{size} {dtype}")

    def test_exported_in_theirs(self):
        """Through build/export in all forms: the weights are torch's own rounding, bit for bit."""
        for i, size in enumerate(SIZES):
            model = random_model(**size, seed=i)
            model.save_pretrained(self.folder / f"{i}")
            for name, dtype in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")):
                out = self.folder / f"{i}_{name}"
                run("export", self.folder / f"{i}", "--out", out, "--dtype", name)
                loaded = load(out)
                self.assertEqual(loaded.dtype, getattr(torch, dtype))
                forms = [loaded]
                if name != "f16":
                    run("export", self.folder / f"{i}", "--out", f"{out}.bin", "--dtype", name,
                        "--format", "llmc")
                    forms.append(llmc_read(f"{out}.bin"))
                for form in forms:
                    for key, w in form.transformer.state_dict().items():
                        want = model.transformer.state_dict()[key].to(getattr(torch, dtype))
                        self.assertTrue(torch.equal(w.to(want.dtype), want), f"{out} {key}")

    def test_rounding(self):
        """Ties, subnormals and the largest numbers, as torch rounds them."""
        model = random_model(**SIZES[0])
        numbers = np.concatenate([np.arange(1, 512) * 2.0 ** e / 64 for e in range(-30, 8,
            3)]).astype(np.float32)
        numbers = np.concatenate([numbers, 1 + np.arange(512, dtype=np.float32) * 2.0 ** -12,
                                  [65519, 6.1e-5, 0]])
        with torch.no_grad():
            w = model.transformer.h[0].mlp.c_fc.weight.view(-1)
            w.copy_(torch.from_numpy(np.resize(numbers, w.numel()).astype(np.float32)))
            w[::3] *= -1                                 # in place: w is a view of the weights
        model.save_pretrained(self.folder / "model")
        for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
            run("export", self.folder / "model", "--out", self.folder / name, "--dtype", name)
            got = load(self.folder / name).transformer.h[0].mlp.c_fc.weight
            self.assertTrue(torch.equal(got, model.transformer.h[0].mlp.c_fc.weight.to(dtype)))

    def test_evaluation(self):
        """The loss that build/evaluate prints, over rows of T tokens."""
        size = SIZES[1]
        model, T = random_model(**size), size["T"]
        model.save_pretrained(self.folder / "model")
        tokens = random_tokens(1, 10 * T + 5, size["V"])[0]
        write_shard(self.folder / "val.bin", tokens)
        run("evaluate", self.folder / "model", "--val", self.folder / "val.bin", "--json",
            self.folder / "out.json")
        rows = np.stack([tokens[i * T:(i + 1) * T + 1] for i in range(10)])
        logits = torch.from_numpy(their_logits(model, np.ascontiguousarray(rows[:, :-1])))
        targets = torch.from_numpy(rows[:, 1:]).long()
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        got = json.loads((self.folder / "out.json").read_text())["full"]["val_loss"]
        self.assertAlmostEqual(got, want, delta=1e-5 * want)


# ---- Training: ten steps of ours beside torch.optim.AdamW ----

class Training(Interop):
    SIZE, T, B, M, STEPS = SIZES[0], 13, 4, 2, 10          # rows shorter than the positions; M
                                                           # micro-batches a step
    EPS = 1e-5          # not less: the bias of attention's keys has gradient 0, so that AdamW
                        # divides rounding by it

    def drop(self, model, kept, scale, tied):
        """Makes model multiply its branches by masks, as torchvision.ops.stochastic_depth does:
        kept (2L,B) of 0 and 1, scale (L), in torchvision always 1 / (1 - p). Returns the hooks."""
        hooks = []
        for l, block in enumerate(model.transformer.h):
            noise = [torch.tensor(kept[2 * l + j], dtype=torch.float64)[:, None, None] * scale[l]
                     for j in (0, 1)]
            if tied:
                def whole(_, inputs, output, noise=noise[0]):
                    y = output[0] if isinstance(output, tuple) else output
                    y = inputs[0] + noise * (y - inputs[0])
                    return (y, *output[1:]) if isinstance(output, tuple) else y
                hooks.append(block.register_forward_hook(whole))
                continue
            for part, factor in ((block.attn, noise[0]), (block.mlp, noise[1])):
                def branch(_, inputs, output, factor=factor):
                    return (factor * output[0], *output[1:]) if isinstance(output,
                        tuple) else factor * output
                hooks.append(part.register_forward_hook(branch))
        return hooks

    def read_plan(self, text):
        """(2L,B) of 0 and 1 out of a plan as metrics.jsonl has it."""
        if "." in text:
            return [[int(rows, 16) >> b & 1 for b in range(self.B)] for rows in text.split(".")]
        return [[int(digit) >> j & 1] * self.B for digit in text for j in (0, 1)]

    def reference(self, model, tokens, records, seed, depth, inverted, tied, skip):
        """Trains model as the records of our run say; returns its losses and gradient norms."""
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1},
                  {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=self.EPS)
        n, losses, norms = (len(tokens) - 1) // self.T, [], []
        for step, record in enumerate(records):
            optimizer.zero_grad()
            plans = [self.read_plan(text) for text in record["plan"].split(" ")]
            self.assertEqual(len(plans), self.M)
            rates = record["drop_p"] * depth
            total = 0.0
            for m, kept in enumerate(plans):
                first = (step * self.M + m) * self.B
                starts = [self.T * window_of(first + b, n, seed) for b in range(self.B)]
                rows = torch.from_numpy(np.stack([tokens[s:s + self.T + 1]
                                                  for s in starts]).astype(np.int64))
                hooks = self.drop(model, kept, 1 / (1 - rates) if inverted else np.ones_like(rates),
                                  tied)
                logits = model(rows[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                         rows[:, 1:].flatten()) / self.M
                loss.backward()
                total += loss.item()
                for hook in hooks:
                    hook.remove()
            if skip:
                for i in np.flatnonzero(~np.any(plans, axis=(0, 2))):
                    block = model.transformer.h[i // 2]
                    for part in ((block.ln_2, block.mlp) if i % 2 else (block.ln_1, block.attn)):
                        for p in part.parameters():
                            p.grad = None
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            losses.append(total)
            for group in optimizer.param_groups:
                group["lr"] = record["lr"]
            optimizer.step()
        return losses, norms

    def check(self, *options, depth=None, inverted=True, tied=False, skip=False, form="huggingface",
              dropped=True):
        """Our run from a model of theirs, and theirs with the plans of ours."""
        seed, V = 5, self.SIZE["V"]
        model = random_model(**self.SIZE)
        start, out = self.folder / "start", self.folder / "run"
        if form == "llmc":
            llmc_write(start, model, "float32")
        else:
            model.save_pretrained(start, **({"max_shard_size": "20KB"} if form == "shards" else {}))
        before = {name: w.clone() for name, w in model.transformer.state_dict().items()}
        tokens = random_tokens(1, 50 * self.T + 1, V)[0]
        write_shard(self.folder / "train.bin", tokens)
        run("train_gpt", "--train", self.folder / "train.bin", "--init-from", start, "--out", out,
            "--seq-len", self.T,
            "--batch", self.B, "--total-batch", self.B * self.T * self.M, "--steps", self.STEPS,
            "--lr", 0.004,
            "--warmup", 2, "--eps", self.EPS, "--drop-ramp-up", 3, "--seed", seed, *options)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual(len(records), self.STEPS)
        kept = np.array([self.read_plan(text) for record in records
                         for text in record["plan"].split(" ")])
        self.assertEqual(bool((kept == 0).any()), dropped)
        L = self.SIZE["L"]
        depth = np.arange(1, L + 1) / L if depth is None else depth
        losses, norms = self.reference(model.double(), tokens, records, seed, depth, inverted, tied,
                                       skip)
        np.testing.assert_allclose([r["loss"] for r in records], losses, rtol=1e-5)
        np.testing.assert_allclose([r["grad_norm"] for r in records], norms, rtol=1e-4)
        self.assertGreater(max(norms), 1, "no gradient was clipped")
        ours = load_file(out / "latest" / "model.safetensors")
        for name, want in model.transformer.state_dict().items():
            moved = (want - before[name]).abs().max().item()
            error = np.abs(ours[f"transformer.{name}"] - want.numpy()).max()
            self.assertGreater(moved, 1e-3, name)
            self.assertLess(error, 5e-4 * moved, f"{name} moved by {moved:.3g}")
        loaded = load(out / "latest")                    # what we saved is what they load
        checked = random_tokens(2, self.SIZE["T"], V)
        self.assert_logits(our_logits(out / "latest", checked, self.folder),
                           their_logits(loaded, checked))

    def test_plain(self):
        self.check(dropped=False)

    def test_batches(self):
        self.check("--drop-path", 0.5, "--drop-sampling", "bernoulli")

    def test_rows(self):
        self.check("--drop-path", 0.5, "--drop-unit", "row", form="shards")

    def test_tied_uniform(self):
        self.check("--drop-path", 0.4, "--drop-unit", "row", "--drop-branches", "tied",
                   "--drop-depth", "uniform",
                   depth=np.ones(self.SIZE["L"]), tied=True, form="llmc")

    def test_unscaled_skipping_adam(self):
        self.check("--drop-path", 0.7, "--drop-scale", "none", "--drop-adam", "skip",
                   inverted=False, skip=True)


# ---- What a run leaves behind ----

class Runs(Interop):
    def train(self, *options):
        (self.folder / "text").write_text(" ".join(str(i * i) for i in range(20000)))
        run("data_bytes", "--out", self.folder / "data", self.folder / "text")
        run("train_gpt", "--train", self.folder / "data" / "train_*.bin", "--out",
            self.folder / "run", "--layers", 3,
            "--heads", 3, "--channels", 24, "--seq-len", 31, "--steps", 30, "--lr", 3e-3, *options)
        return self.folder / "run" / "latest"

    def test_checkpoint_and_byte_tokenizer(self):
        """A run's checkpoint opens as it is; exported, with its tokenizer."""
        checkpoint, out = self.train("--drop-path", 0.2), self.folder / "out"
        run("export", checkpoint, "--out", out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        text = "Grüße, 世界!  two spaces\n\ttab \u00a0 it's 123<|endoftext|>"
        ids = tokenizer(text).input_ids
        self.assertEqual(ids, list(text.replace("<|endoftext|>", "").encode()) + [256])
        # it has one of its own
        self.assertEqual(AutoTokenizer.from_pretrained(checkpoint)(text).input_ids, ids)
        self.assertEqual(tokenizer.decode(ids, clean_up_tokenization_spaces=False), text)
        self.assertEqual((tokenizer.eos_token_id, tokenizer.model_max_length, len(tokenizer)),
                         (256, 31, 257))
        tokens = np.array([ids[:31], ids[5:36]], np.int32)
        ours = our_logits(checkpoint, tokens, self.folder)
        for folder in (checkpoint, out):
            loaded = load(folder)
            self.assertEqual((loaded.config.eos_token_id, loaded.generation_config.eos_token_id),
                             (256, 256))
            self.assert_logits(ours, their_logits(loaded, tokens), what=folder)
        greedy = load(out).generate(torch.tensor([ids[:5]]), max_new_tokens=20, do_sample=False,
                                    pad_token_id=256)[0]
        prompt = tokenizer.decode(ids[:5])
        said = run("generate", out, "--prompt", prompt, "--tokens", 20, "--temperature", 0)
        self.assertEqual(said.rstrip("\n"),
                         tokenizer.decode(greedy, skip_special_tokens=True).rstrip("\n"))

    def test_survival_is_folded(self):
        checkpoint, out = self.train("--drop-path", 0.5, "--drop-scale",
                                     "survival"), self.folder / "out"
        run("export", checkpoint, "--out", out)
        run("export", checkpoint, "--out", self.folder / "out.bin", "--format", "llmc")
        tokens = random_tokens(2, 31, 257)
        ours = our_logits(checkpoint, tokens, self.folder)
        for model in (load(out), llmc_read(self.folder / "out.bin")):
            self.assert_logits(ours, their_logits(model, tokens))
        unfolded = their_logits(load(checkpoint), tokens)
        self.assertGreater(np.abs(unfolded - ours).max(), 1e-3, "the factors do nothing here")

    def test_merges(self):
        """A vocabulary that was learned elsewhere: the merges that made it are found again, and a
        text's tokens."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        learned = Tokenizer(models.BPE())
        learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learned.decoder = decoders.ByteLevel()
        files = [str(path) for path in pathlib.Path(".").glob("*.md")] + ["train_gpt.c"]
        learned.train(files, trainers.BpeTrainer(vocab_size=1003, special_tokens=["<|endoftext|>"],
                                                 show_progress=False,
                                                 initial_alphabet=pre_tokenizers.ByteLevel.alphabet(
                                                     )))
        model = json.loads(learned.to_str())["model"]
        (self.folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        random_model(**SIZES[2]).save_pretrained(self.folder / "model")
        run("export", self.folder / "model", "--out", self.folder / "out", "--tokenizer",
            self.folder / "vocab.json")
        made = json.loads((self.folder / "out" / "tokenizer.json").read_text())["model"]
        self.assertEqual(made["vocab"], model["vocab"])
        self.assertEqual([merge.split(" ") for merge in made["merges"]],
                         [list(merge) for merge in model["merges"]])
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "out")
        text = pathlib.Path("dev/model/gpt.h").read_text() + "Grüße — 世界 🙂\n"
        self.assertEqual(tokenizer(text).input_ids, learned.encode(text).ids)
        self.assertEqual(tokenizer.decode(tokenizer(text).input_ids,
                                          clean_up_tokenization_spaces=False), text)


if __name__ == "__main__":
    from test_lora import Lora  # noqa: F401  pylint: disable=unused-import
    torch.set_num_threads(1)
    sys.modules["test_interop"] = sys.modules["__main__"]
    from test_analysis import Analysis  # noqa: F401  unittest finds them here
    from test_layers import Layers  # noqa: F401
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    program = unittest.main(verbosity=2, exit=False)
    bad = len(program.result.failures) + len(program.result.errors)
    print(f"{program.result.testsRun - bad} passed, {bad} failed", flush=True)
    sys.exit(bad > 0)
