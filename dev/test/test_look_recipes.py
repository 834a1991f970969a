"""Tests of the recipes in scripts/, scaled down by their variables: they run to their end, and go
on."""
import json
import os
import socket
import subprocess
import unittest

import real_runs

SMALL = "--layers 2 --heads 2 --channels 16 --seq-len 16 --batch 4 --eval-tokens 500 --threads 1"
TINY = "--layers 2 --heads 2 --channels 16 --threads 1"


class Recipes(unittest.TestCase):
    def recipe(self, name, *arguments, expect=0, **variables):
        out = os.path.join(real_runs.folder(), name)
        env = {**os.environ, "BUILD": real_runs.BUILD, "OUT": out,
               "PYTHON": real_runs.sys.executable, **variables}
        done = subprocess.run(["sh", f"scripts/{name}.sh", *arguments], cwd=real_runs.ROOT, env=env,
                              text=True,
                              # samples may be no UTF-8 so early
                              capture_output=True, errors="replace")
        self.assertEqual(done.returncode, expect, done.stdout + done.stderr)
        return out, done.stdout + done.stderr

    def text(self):
        return os.path.join(os.path.dirname(real_runs.data()), "text")

    def need_data(self, *packages):
        here = os.path.exists(os.path.join(real_runs.ROOT, "data/prepare.py"))
        if not here or not all(map(real_runs.have, packages)):
            self.skipTest("data/requirements.txt is not installed")

    def test_tinyshakespeare(self):
        out, text = self.recipe("tinyshakespeare", TEXT=self.text(), STEPS="4", MORE=SMALL)
        for part in ("step 4/4", "reduced", " tokens at "):
            self.assertIn(part, text)
        self.assertEqual(os.path.exists(out + "/picture.png"), real_runs.have("matplotlib"))

    def test_sweep(self):
        sizes = SMALL.split()
        data = real_runs.data()
        out, text = self.recipe("sweep", *sizes, DATA=data, STEPS="4", RATES="0 0.4", SEEDS="1 2")
        self.assertEqual(text.count("== rate"), 4)
        self.assertRegex(text, r"\| p0.4 +\| +2 \|")
        out, text = self.recipe("sweep", *sizes, DATA=data, STEPS="4", RATES="0 0.2 0.4",
                                SEEDS="1 2")
        self.assertEqual(text.count("== rate 0.2"), text.count("== rate"))
        with open(out + "/table.md", encoding="utf-8") as file:
            self.assertEqual([line.split("|")[1].strip() for line in file][2:],
                             ["p0", "p0.2", "p0.4"])
        for name in ("curves.png", "ends.svg"):
            self.assertEqual(os.path.exists(f"{out}/{name}"), real_runs.have("matplotlib"))

    def test_prune_heal(self):
        small = {"DATA": real_runs.data(), "SEEDS": "1 2", "STEPS": "20", "LAYERS": "3",
                 "REMOVE": "1", "LAST": "1",
                 "TOKENS": "512", "THREADS": "1", "DTYPE": "fp32"}
        out, text = self.recipe("prune_heal", **small)
        with open(out + "/table.md", encoding="utf-8") as file:
            rows = {cells[1].strip(): [x.strip() for x in cells[2:5]] for cells in (line.split("|")
                for line in file)}
        self.assertEqual(len(rows), 11)
        for title in ("all layers", "1 removed, greedily", "1 removed, in a row, by angle",
                      "greedy removal costs",
                      "1 removed greedily, all of it trained on",
                      "1 removed greedily, adapters trained on it",
                      "nothing removed, trained on as long"):
            for cell in rows[title]:
                self.assertRegex(cell, r"^[+-]?\d+\.\d{4} ± \d+\.\d{4}$")
        with open(out + "/costs.md", encoding="utf-8") as file:
            costs = [[x.strip() for x in line.split("|")[1:-1]] for line in file]
        self.assertEqual((len(costs), len(costs[0])), (2 + 2 * 4, 1 + 2 + 1))
        for seconds in costs[2:]:                       # evaluated after each of the 2 steps
            self.assertRegex(" ".join(seconds[1:3]),
                             r"^[+-]\d\.\d{4} \(\d+\.\d\) [+-]\d\.\d{4} \(\d+\.\d\)$")
        # the last evaluation is that of the other table, of the same models
        healed = float(rows["1 removed greedily, adapters trained on it"][0].split()[0])
        curves = []
        for seed in (1, 2):
            with open(f"{out}/curve/none_s{seed}_pruned.json", encoding="utf-8") as file:
                curves.append(json.load(file)["full"]["val_loss"])
        gained = float(costs[2 + 2][2].split()[0])
        self.assertAlmostEqual(sum(curves) / 2 - gained, healed, places=3)
        self.assertIn(": 2 of 3 layers of ", text)
        self.assertEqual(os.path.exists(out + "/loss_by_layers.svg"), real_runs.have("matplotlib"))
        # it is all there
        self.assertNotIn("step ", self.recipe("prune_heal", **small)[1].split("== none_s1")[1])
        self.assertIn("must count up", self.recipe("prune_heal", expect=1,
                                                   **{**small, "SEEDS": "1 3"})[1])

    def test_companions(self):
        small = {"DATA": real_runs.data(), "SEEDS": "2", "STEPS": "6", "LAYERS": "2",
                 "CHANNELS": "16", "LRS": "3e-3", "JOBS": "1", "ARMS": "none hard rdrop distill"}
        for _ in range(2):                               # the second time nothing is left to do
            out, text = self.recipe("companions", **small)
            self.assertRegex(text, r"\| nothing \| 6 \| \d")
            self.assertRegex(text, r"\| AttentionDrop, hard \+ drop path \| \d+ "
                                   r"\| \d\.\d{4} \| [+-]")
            self.assertRegex(text, r"\| dropout 0.1, consistency \| 3 \|")
            self.assertIn("| distillation |", text)

    def test_finetune(self):
        self.assertIn("on which text?", self.recipe("finetune", expect=1, TEXT="")[1])
        self.assertIn("hint: hf download", self.recipe("finetune", expect=1, TEXT=self.text(),
            INIT="/nowhere")[1])
        self.need_data("numpy", "tqdm")
        start = real_runs.trained("base_s1", "--seed", "1") + "/latest"
        text = self.recipe("finetune", TEXT=self.text(), INIT=start, TOKENIZER="bytes", STEPS="4",
                           SEQ="16",
                           MORE="--batch 4 --eval-tokens 500")[1]
        self.assertIn("before:", text)
        self.assertIn("after:", text)

    def test_tinystories(self):
        self.need_data("numpy", "tqdm", "tokenizers")
        out, text = self.recipe("tinystories", TEXT=self.text(), VOCAB="270", STEPS="4", MORE=SMALL)
        self.assertIn("Once upon a time", text)
        text = self.recipe("tinystories", TEXT=self.text(), VOCAB="270", STEPS="4", MORE=SMALL)[1]
        self.assertIn("nothing to do", text)

    def test_fineweb124m(self):
        tiny = {"SCALE": "tiny", "TEXT": self.text(), "STEPS": "4", "MORE": TINY}
        out, text = self.recipe("fineweb124m", **tiny)
        for part in ("== drop path 0, 1 process\n", "== drop path 0.1, 1 process\n", "step 4/4",
                     " tokens at "):
            self.assertIn(part, text)
        # 4 steps x 16 x 4 rows x 64 tokens
        self.assertRegex(text, r"\| drop0.1 +\| +1 \| +4 \| +1.638e\+04 \|")
        self.assertEqual(os.path.exists(out + "/picture.png"), real_runs.have("matplotlib"))
        text = self.recipe("fineweb124m", **tiny, GPUS="2", DROP="0 0.2")[1]
        self.assertIn("has already completed all 4 steps", text)
        self.assertIn("ranks:   2 processes, each 8 micro-batches", text)
        for part, wrong in (("it is full or tiny", {"SCALE": "huge"}),
                            ("has no train_*.bin", {"DATA": "/nowhere"}),
                            ("hint: make CUDA=1", {"SCALE": "full", "BUILD": "/nowhere"})):
            self.assertIn(part, self.recipe("fineweb124m", expect=1, **{**tiny, **wrong})[1])

    def test_slurm(self):
        """A stand-in for srun starts the ranks as it would."""
        with open(os.path.join(real_runs.folder(), "srun"), "w", encoding="utf-8") as file:
            file.write("""#!/bin/sh
                shift
                for SLURM_PROCID in 0 1; do
                    SLURM_LOCALID=$SLURM_PROCID SLURM_PROCID=$SLURM_PROCID SLURM_STEP_ID=0 \\
                        SLURM_STEP_NUM_TASKS=2 "$@" &
                done
                wait $! && wait""")
        os.chmod(file.name, 0o755)
        with socket.socket() as free:                      # as of now
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "5", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port),
               "PATH": real_runs.folder() + ":" + os.environ["PATH"]}
        text = self.recipe("slurm", SCALE="tiny", TEXT=self.text(), STEPS="2", DROP="0.1",
                           MORE=TINY, **job)[1]
        self.assertIn("== drop path 0.1, 2 processes", text)
        self.assertIn("ranks:   2 processes, each 8 micro-batches", text)
        self.assertIn("hint: sbatch scripts/slurm.sh", self.recipe("slurm", expect=1,
            SLURM_NTASKS="")[1])


if __name__ == "__main__":
    unittest.main()
