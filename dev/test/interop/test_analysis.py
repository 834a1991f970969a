"""ReplaceMe and neural collapse beside transformers: the classes that test_interop.py runs too.

The reference is numpy on the hidden states of transformers' GPT2LMHeadModel in double precision:
least squares by numpy.linalg.lstsq, folded here into that model's own weights; class means and
pairs by plain loops.
"""
import copy
import json

import numpy as np
import torch
from test_interop import Interop, load, random_model, random_tokens, run, their_logits, write_shard
from test_layers import stream, without

SIZE = dict(V=61, T=17, C=24, L=5, NH=3)
ROWS, CALIBRATION = 8, 60


class Analysis(Interop):
    def setUp(self):
        super().setUp()
        self.model = random_model(**SIZE)
        self.model.save_pretrained(self.folder / "model")
        self.rows = {}
        for name, rows, seed in (("val", ROWS, 2), ("train", CALIBRATION, 3)):
            T = SIZE["T"]
            tokens = random_tokens(1, rows * T + 1, SIZE["V"], seed)[0]
            write_shard(self.folder / f"{name}.bin", tokens)
            whole = np.stack([tokens[i * T:(i + 1) * T + 1] for i in range(rows)])
            self.rows[name] = np.ascontiguousarray(whole[:, :-1]), np.ascontiguousarray(whole[:,
                1:])

    def loss(self, model, part="val"):
        inputs, targets = self.rows[part]
        logits = torch.from_numpy(their_logits(model, inputs))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1),
                                                 torch.from_numpy(targets).long().flatten()).item()

    def replaced(self, first, end):
        """transformers' model without the layers, and numpy's map in the projection before them."""
        x = [p.reshape(-1, SIZE["C"]) for p in stream(copy.deepcopy(self.model),
            self.rows["train"][0])]
        m, a2 = x[2 * first] - x[2 * first - 1], x[2 * end] - x[2 * first - 1]
        t = np.linalg.lstsq(np.hstack([m, np.ones((len(m), 1))]), a2, rcond=None)[0]
        model = copy.deepcopy(self.model).double()
        last = model.transformer.h[first - 1].mlp.c_proj
        with torch.no_grad():
            last.weight.copy_(last.weight @ torch.from_numpy(t[:-1]))
            last.bias.copy_(last.bias @ torch.from_numpy(t[:-1]) + torch.from_numpy(t[-1]))
        return without(model, range(first, end))

    def test_replaced(self):
        """The model that build/prune writes is that of numpy, and transformers has the loss that
        prune.json says."""
        for first, end in ((1, 2), (2, 4), (1, 5)):
            out, want = self.folder / f"replaced{first}{end}", self.replaced(first, end)
            run("prune", self.folder / "model", "--out", out, "--drop", f"{first}-{end - 1}",
                "--method", "replace", "--ridge", 0,
                "--val", self.folder / "val.bin", "--calib", self.folder / "train.bin",
                "--calib-tokens", CALIBRATION * SIZE["T"])
            got, report = load(out), json.loads((out / "prune.json").read_text())
            for key, w in want.transformer.state_dict().items():
                near = torch.allclose(got.transformer.state_dict()[key].double(), w, rtol=2e-4,
                                      atol=2e-4)
                self.assertTrue(near, f"{first}-{end}: {key}")
            self.assertLessEqual(abs(report["loss_after"] - self.loss(got.double())), 1e-5)
            self.assertLessEqual(abs(report["loss_after"] - self.loss(want)), 1e-3)
            self.assertLessEqual(abs(report["loss_deleted"] - self.loss(without(self.model,
                range(first, end)))), 1e-5)

    def test_collapse(self):
        """Means, variances, duality and agreement, on transformers' last hidden state."""
        def features(part):
            inputs, targets = self.rows[part]
            with torch.no_grad():
                h = self.model.double().transformer(torch.from_numpy(inputs).long(
                    )).last_hidden_state
            return h.reshape(-1, SIZE["C"]).numpy(), targets.reshape(-1)

        run("collapse", self.folder / "model", "--train", self.folder / "train.bin", "--val",
            self.folder / "val.bin",
            "--min-count", 8, "--tokens", 0, "--val-tokens", 0, "--json", self.folder / "out.json")
        got = json.loads((self.folder / "out.json").read_text())["checkpoints"][0]
        h, labels = features("train")
        head = self.model.transformer.wte.weight.detach().double().numpy()
        classes = [c for c in range(SIZE["V"]) if (labels == c).sum() >= 8]
        means = np.array([h[labels == c].mean(0) for c in classes])
        spread = [((h[labels == c] - h[labels == c].mean(0)) ** 2).sum(1).mean() for c in classes]
        pairs = [(i, j) for i in range(len(classes)) for j in range(i)]
        cdnv = [(spread[i] + spread[j]) / 2 / ((means[i] - means[j]) ** 2).sum() for i, j in pairs]
        centred = means - means.mean(0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        kernel = [-np.log(np.linalg.norm(unit[i] - unit[j])) for i, j in pairs]
        cosine = (unit * head[classes]).sum(1) / np.linalg.norm(head[classes], axis=1)
        seen = np.unique(labels)
        every = np.array([h[labels == c].mean(0) for c in seen])
        val, val_labels = features("val")
        nearest = seen[((val[:, None] - every[None]) ** 2).sum(-1).argmin(1)]
        want = {"classes": len(classes), "coverage": np.isin(labels, classes).mean(),
                "cdnv": np.mean(cdnv),
                "log_kernel": np.mean(kernel), "log_kernel_var": np.var(kernel),
                "duality": cosine.mean(),
                "duality_var": cosine.var(ddof=1),
                "agreement": ((val @ head.T).argmax(1) == nearest).mean(),
                "mean_accuracy": (nearest == val_labels).mean()}
        for name, value in want.items():
            self.assertLessEqual(abs(got[name] - value), 1e-5 * max(1, abs(value)),
                                 f"{name}: got {got[name]}, want {value}")
