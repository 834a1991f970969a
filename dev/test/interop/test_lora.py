"""Our adapters in the hands of peft, and peft's in ours: loaded, merged, and twenty steps of AdamW
side by side.

Run:    make test-interop              or some: dev/test/interop/run.sh Lora.test_steps
Needs:  peft beside what test_interop.py needs
"""
import json
import warnings

import numpy as np
import peft
import torch
from safetensors.numpy import load_file
from test_interop import (SIZES, Interop, load, our_logits, random_model, random_tokens, run,
                          their_logits, window_of, write_shard)

MODULES = {"qkv": "attn.c_attn", "attproj": "attn.c_proj", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}


def quiet():
    """Warnings become errors: no key is missing or left over. Deprecations are ignored."""
    warnings.simplefilter("error")
    for kind in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)


def adapted(model, rank, alpha, targets, norms=False, seed=3, **more):
    """model with peft's adapters, with values far from the initial ones."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=True,
                             task_type="CAUSAL_LM",
                             modules_to_save=["ln_1", "ln_2", "ln_f"] if norms else None, **more)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator) + ("ln_" in name
                    and name.endswith("weight")))
    return model.eval()


class Lora(Interop):
    def train(self, start, tokens, out, *options, steps=20, size=SIZES[0]):
        write_shard(self.folder / "train.bin", tokens)
        run("train_gpt", "--train", self.folder / "train.bin", "--init-from", start, "--out", out,
            "--seq-len", 13,
            "--batch", 4, "--total-batch", 4 * 13 * 2, "--steps", steps, "--lr", 0.004, "--warmup",
            2, "--eps", 1e-5,
            "--seed", 5, *options)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def test_theirs_in_ours(self):
        """Saved by peft, with targets named in several ways; read, evaluated and merged by us."""
        ways = [(4, 8, list(MODULES.values()), {}), (1, 3, ["c_attn"], {}), (7, 7, ["c_proj"], {}),
                (3, 6, "all-linear", {}),
                (5, 10, ["c_fc", "attn.c_proj"], {"lora_dropout": 0.3})]
        for i, (rank, alpha, targets, more) in enumerate(ways):
            for norms in (False, True):
                size = SIZES[i % len(SIZES)]
                base, saved, merged = (self.folder / f"{kind}{i}{norms}" for kind in ("base",
                    "adapter", "merged"))
                random_model(**size, seed=i).save_pretrained(base)
                model = adapted(load(base), rank, alpha, targets, norms, **more)
                model.save_pretrained(saved)
                tokens = random_tokens(3, size["T"], size["V"])
                want = their_logits(model, tokens)
                self.assert_logits(our_logits(saved, tokens, self.folder), want,
                                   what=f"{targets}, norms {norms}")
                self.assertGreater(np.abs(want - their_logits(load(base), tokens)).max(), 0.1,
                                   "the adapter does nothing")
                run("export", saved, "--out", merged)
                self.assert_logits(their_logits(load(merged), tokens), want, what="merged by us")

    def test_ours_in_theirs(self):
        """After some of our steps, peft opens the adapter, computes and merges the same."""
        size = SIZES[0]
        base = self.folder / "base"
        random_model(**size).save_pretrained(base)
        tokens, checked = random_tokens(1, 60 * 13 + 1, size["V"])[0], random_tokens(3, size["T"],
            size["V"])
        for i, options in enumerate((["--lora", 4], ["--lora", 3, "--lora-targets", "qkv,fcproj",
            "--lora-alpha", 9],
                                     ["--lora", 5, "--lora-norms", 1, "--lora-dropout", 0.2])):
            out, merged = self.folder / f"run{i}", self.folder / f"merged{i}"
            self.train(base, tokens, out, *options, steps=12)
            with warnings.catch_warnings():
                quiet()
                model = peft.PeftModel.from_pretrained(load(base), out / "latest").eval()
            want = their_logits(model, checked)
            self.assert_logits(our_logits(out / "latest", checked, self.folder), want, what=options)
            self.assertGreater(np.abs(want - their_logits(load(base), checked)).max(), 1e-2,
                               "nothing was learnt")
            run("export", out / "latest", "--out", merged)
            ours, theirs = load(merged).state_dict(), model.double().merge_and_unload().state_dict()
            for name, w in theirs.items():
                error = (ours[name].double() - w).abs().max().item()
                self.assertLess(error, 2e-6, f"{name} of {options}")
            run("export", out / "latest", "--out", self.folder / f"adapter{i}", "--adapter", 1)
            again = peft.PeftModel.from_pretrained(load(base), self.folder / f"adapter{i}").eval()
            np.testing.assert_array_equal(their_logits(again, checked), want)

    def check_steps(self, *options, rank, alpha, targets, norms=False):
        """Twenty steps of AdamW: ours, and torch's on peft's model with our initial adapter."""
        size, T, B, M = SIZES[0], 13, 4, 2
        base, first, out = self.folder / "base", self.folder / "first", self.folder / "run"
        random_model(**size).save_pretrained(base)
        tokens = random_tokens(1, 50 * T + 1, size["V"])[0]
        options = ("--lora", rank, "--lora-alpha", alpha, "--lora-targets", ",".join(targets),
                   "--lora-norms", int(norms),
                   "--drop-path", 0, *options)
        # nothing moves: the initial adapter
        self.train(base, tokens, first, *options, "--lr", 0, steps=1)
        records = self.train(base, tokens, out, *options)
        with warnings.catch_warnings():
            quiet()
            model = peft.PeftModel.from_pretrained(load(base), first / "latest",
                                                   is_trainable=True).double().eval()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.assertEqual(sum(p.numel() for p in trained.values()),
                         sum(w.size for w in load_file(first / "latest" /
                                                       "adapter_model.safetensors").values()))
        optimizer = torch.optim.AdamW([{"params": [p for p in trained.values() if p.dim() == 2],
                                        "weight_decay": 0.1},
                                       {"params": [p for p in trained.values() if p.dim() == 1],
                                        "weight_decay": 0.0}],
                                      betas=(0.9, 0.95), eps=1e-5)
        start = {name: p.detach().clone() for name, p in trained.items()}
        n, losses, norms_seen = (len(tokens) - 1) // T, [], []
        for step, record in enumerate(records):
            optimizer.zero_grad()
            total = 0.0
            for m in range(M):
                places = [T * window_of((step * M + m) * B + b, n, 5) for b in range(B)]
                rows = torch.from_numpy(np.stack([tokens[s:s + T + 1]
                                                  for s in places]).astype(np.int64))
                logits = model(rows[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                         rows[:, 1:].flatten()) / M
                loss.backward()
                total += loss.item()
            norms_seen.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item())
            losses.append(total)
            for group in optimizer.param_groups:
                group["lr"] = record["lr"]
            optimizer.step()
        np.testing.assert_allclose([r["loss"] for r in records], losses, rtol=1e-5)
        np.testing.assert_allclose([r["grad_norm"] for r in records], norms_seen, rtol=1e-4)
        ours = load_file(out / "latest" / "adapter_model.safetensors")
        for name, p in trained.items():
            key = name.replace(".default", "").replace("modules_to_save.", "")
            moved = (p - start[name]).abs().max().item()
            error = np.abs(ours[key] - p.detach().numpy()).max()
            self.assertGreater(moved, 1e-3, name)
            self.assertLess(error, 1e-5 + 5e-4 * moved, f"{name} moved by {moved:.3g}")

    def test_steps(self):
        self.check_steps(rank=4, alpha=8, targets=list(MODULES))

    def test_steps_some_targets_and_norms(self):
        self.check_steps(rank=3, alpha=2, targets=["attproj", "fc"], norms=True)

    def test_refused(self):
        """Settings that would give the same tensors another meaning are refused by name."""
        size = SIZES[1]
        base = self.folder / "base"
        random_model(**size).save_pretrained(base)
        kinds = {"rank_pattern": dict(rank_pattern={"c_attn": 2}),
                 "alpha_pattern": dict(alpha_pattern={"c_attn": 2}),
                 "use_dora": dict(use_dora=True), "use_rslora": dict(use_rslora=True),
                 "layers_to_transform": dict(layers_to_transform=[0])}
        for name, more in kinds.items():
            saved = self.folder / name
            adapted(load(base), 4, 8, ["c_attn", "c_fc"], **more).save_pretrained(saved)
            with self.assertRaisesRegex(AssertionError, name):
                run("export", saved, "--out", self.folder / "out")
