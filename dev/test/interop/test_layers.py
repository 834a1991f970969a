"""Layer scores and pruned models beside transformers: the classes that test_interop.py runs too.

The reference is numpy on the hidden states of transformers' GPT2LMHeadModel in double precision,
the last one read before ln_f, and that model with layers taken out of its list.
"""
import copy
import json

import numpy as np
import torch
from test_interop import (Interop, load, our_logits, random_model, random_tokens, run,
                          their_logits, write_shard)

SIZE = dict(V=61, T=17, C=24, L=5, NH=3)
ROWS = 8


def without(model, layers=(), attention=(), mlp=()):
    """A copy with these layers gone, and with zeros as the last projection of these branches."""
    pruned = copy.deepcopy(model)
    blocks = pruned.transformer.h
    for kind, which in (("attn", attention), ("mlp", mlp)):
        for layer in which:
            for p in getattr(blocks[layer], kind).c_proj.parameters():
                torch.nn.init.zeros_(p)
    pruned.transformer.h = torch.nn.ModuleList(b for i, b in enumerate(blocks) if i not in layers)
    pruned.config.n_layer = len(pruned.transformer.h)
    for i, block in enumerate(pruned.transformer.h):
        block.attn.layer_idx = i                         # of a cache that is not used here
    return pruned


def stream(model, inputs):
    """What layer 0 reads, what is between the branches of each, and what each leaves: (2L+1) arrays
    (rows,T,C)."""
    seen = []
    hooks = [model.transformer.h[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))]
    for block in model.transformer.h:
        hooks.append(block.ln_2.register_forward_pre_hook(lambda _, x: seen.append(x[0])))
        hooks.append(block.register_forward_hook(lambda _, x, y: seen.append(y[0] if isinstance(y,
            tuple) else y)))
    with torch.no_grad():
        states = model.double()(torch.from_numpy(inputs).long(), output_hidden_states=True,
                                use_cache=False).hidden_states
    for hook in hooks:
        hook.remove()
    for l, state in enumerate(states[:-1]):              # the last of transformers' own is after
                                                         # ln_f
        assert torch.equal(state, seen[2 * l])
    return [x.numpy() for x in seen]


class Layers(Interop):
    def setUp(self):
        super().setUp()
        self.model, T = random_model(**SIZE), SIZE["T"]
        tokens = random_tokens(1, ROWS * T + 1, SIZE["V"])[0]
        self.model.save_pretrained(self.folder / "model")
        write_shard(self.folder / "val.bin", tokens)
        rows = np.stack([tokens[i * T:(i + 1) * T + 1] for i in range(ROWS)])
        self.inputs, self.targets = np.ascontiguousarray(rows[:, :-1]), torch.from_numpy(rows[:,
            1:]).long()

    def loss(self, model):
        logits = torch.from_numpy(their_logits(model, self.inputs))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                 self.targets.flatten()).item()

    def close(self, got, want, what):
        self.assertLessEqual(abs(got - want), 1e-5 * max(1, abs(want)),
                             f"{what}: got {got}, want {want}")

    def test_scores(self):
        """Block Influence, angular distance of every span, sizes of branches, for two numbers of
        positions left out."""
        x = stream(self.model, self.inputs)
        for skip in (0, 3):
            run("layers", self.folder / "model", "--val", self.folder / "val.bin", "--json",
                self.folder / "out.json",
                "--skip-first", skip, "--batch", 3, "--branches", 0, "--exits", 0, "--greedy", 0)
            got = json.loads((self.folder / "out.json").read_text())

            def cosines(a, b, skip=skip):
                a, b = x[a][:, skip:], x[b][:, skip:]
                return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

            for l, layer in enumerate(got["layers"]):
                self.close(layer["block_influence"], 1 - cosines(2 * l, 2 * l + 2).mean(),
                           f"BI {l}")
                for n, distance in enumerate(got["angular"][l], 1):
                    want = np.arccos(np.clip(cosines(2 * l, 2 * (l + n)), -1, 1)).mean() / np.pi
                    self.close(distance, want, f"angle {l} {n}")
                for b, name in enumerate(("attn", "mlp")):
                    before, after = x[2 * l + b][:, skip:], x[2 * l + b + 1][:, skip:]
                    size = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
                    self.close(layer[name]["relative_size"], size.mean(), f"size {l} {name}")
                    self.close(layer[name]["block_influence"],
                               1 - cosines(2 * l + b, 2 * l + b + 1).mean(), f"BI {l} {name}")
            self.assertEqual([len(row) for row in got["angular"]], [5, 4, 3, 2, 1])

    def test_losses(self):
        """Without each layer, without each branch, with the first layers alone."""
        run("layers", self.folder / "model", "--val", self.folder / "val.bin", "--json",
            self.folder / "out.json", "--greedy", 2)
        got, L = json.loads((self.folder / "out.json").read_text()), SIZE["L"]
        self.close(got["loss"], self.loss(self.model), "loss")
        for l, layer in enumerate(got["layers"]):
            self.close(layer["loss_without"], self.loss(without(self.model, [l])), f"without {l}")
            self.close(layer["attn"]["loss_without"], self.loss(without(self.model, attention=[l])),
                       f"attention {l}")
            self.close(layer["mlp"]["loss_without"], self.loss(without(self.model, mlp=[l])),
                       f"MLP {l}")
            self.close(layer["exit_loss"], self.loss(without(self.model, range(l + 1, L))),
                       f"exit {l}")
        gone = []
        for step in got["greedy"]:
            best = min((l for l in range(L) if l not in gone),
                       key=lambda l: self.loss(without(self.model, [*gone, l])))
            self.assertEqual(step["layer"], best)
            gone.append(best)
            self.close(step["loss"], self.loss(without(self.model, gone)), f"greedy {gone}")

    def test_pruned(self):
        """What build/prune writes opens in transformers, with the weights and the loss of the model
        without its layers."""
        wants = {"1,3": without(self.model, [1, 3]), "0-1,4": without(self.model, [0, 1, 4]),
                 "2,0.attn,4.mlp": without(without(self.model, attention=[0], mlp=[4]), [2])}
        for i, (layers, want) in enumerate(wants.items()):
            out = self.folder / f"pruned{i}"
            run("prune", self.folder / "model", "--out", out, "--drop", layers, "--val",
                self.folder / "val.bin")
            got, report = load(out), json.loads((out / "prune.json").read_text())
            for key, w in want.transformer.state_dict().items():
                self.assertTrue(torch.equal(got.transformer.state_dict()[key], w.float()),
                                f"{layers}: {key}")
            self.assertEqual(got.config.n_layer, want.config.n_layer)
            self.close(report["loss_after"], self.loss(want), layers)
            self.close(report["loss_before"], self.loss(self.model), layers)
            self.assert_logits(our_logits(out, self.inputs, self.folder),
                               their_logits(want, self.inputs),
                               their_logits(copy.deepcopy(want), self.inputs, torch.float32),
                               layers)
