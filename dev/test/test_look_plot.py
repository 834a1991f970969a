"""Tests of scripts/plot.py and runs.py, on real runs."""
import json
import math
import os
import tempfile
import unittest
import xml.etree.ElementTree

import real_runs
from runs import Run, find_runs, group_name, group_runs, records

needs_matplotlib = unittest.skipUnless(real_runs.have("matplotlib"), "matplotlib is missing")
PLOT = "scripts/plot.py"


def base(seed=1):
    return real_runs.trained(f"base_s{seed}", "--seed", str(seed))


def drop(seed=1):
    return real_runs.trained(f"drop_s{seed}", "--seed", str(seed), "--drop-path", "0.5")


def rows():
    return real_runs.trained("rows", "--drop-path", "0.5", "--drop-unit", "row")


def svg_text(path):
    root = xml.etree.ElementTree.parse(path).getroot()
    return "\n".join("".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text"))


class Reading(unittest.TestCase):
    def written(self, *lines):
        path = os.path.join(tempfile.mkdtemp(dir=real_runs.folder()), "metrics.jsonl")
        with open(path, "wb") as file:
            file.write(b"".join(lines))
        return path

    def test_columns(self):
        run = Run(base(), "base")
        self.assertEqual(list(run.column("step")), list(range(1, 41)))
        self.assertEqual(sum(map(math.isfinite, run.column("val_loss"))), 4)
        self.assertEqual(run.config["drop-path"], "0")
        self.assertTrue(math.isnan(run.last("no such number")))

    def test_end_may_be_damaged(self):
        with open(base() + "/metrics.jsonl", "rb") as file:
            good = file.readlines()
        for end in (good[3][:30], b"\0" * 50, b"\xff\xfe\n", good[3][:30] + b"\n[1]\n", b"null"):
            self.assertEqual(len(list(records(self.written(*good[:3], end)))), 3, end)

    def test_elsewhere_it_may_not(self):
        with open(base() + "/metrics.jsonl", "rb") as file:
            good = file.readlines()
        for lines, message in (((good[0], good[1][:20] + b"\n", good[2]), ":2: not a record"),
                               ((good[0], good[2], good[1]), ":3: step 2 after step 3"),
                               ((good[0][:9],), "no records"), ((), "no records")):
            with self.assertRaisesRegex(SystemExit, message):
                list(records(self.written(*lines)))

    def test_seeds_make_a_group(self):
        groups = group_runs([Run(r, os.path.basename(r)) for r in (base(1), drop(1), base(2),
            rows(), drop(2))])
        self.assertEqual([(group_name(g), len(g)) for g in groups], [("base", 2), ("drop", 2),
            ("rows", 1)])

    def test_folder_of_runs(self):
        base(), drop()
        found = find_runs([os.path.dirname(base()), base()])
        self.assertIn(drop(), found)
        self.assertEqual(len(found), len(set(found)))


@needs_matplotlib
class Kept(unittest.TestCase):
    """The means that a heat map shows are those that the trainer itself has recorded."""

    def check(self, path):
        import numpy
        import plot
        for columns in (plot.COLUMNS, 4):                # also with bins that had to double
            plot.COLUMNS, usual = columns, plot.COLUMNS
            heat = plot.KeptMap(numpy)
            run = Run(path, "run", heat.look)
            plot.COLUMNS = usual
            dropped = heat.dropped()
            self.assertLessEqual(len(dropped), 2 * columns)
            counts = [heat.width] * (len(heat.sums) - 1) + [heat.inside or heat.width]
            self.assertEqual(sum(counts), 40)
            for branch, key in enumerate(("kept_attn", "kept_mlp")):
                mine = (dropped[:, :, branch].mean(axis=1) * counts).sum() / 40
                self.assertAlmostEqual(mine, 1 - sum(run.column(key)) / 40, places=9)

    def test_batch_units(self):
        self.check(drop())

    def test_row_units(self):                           # 5 rows: not a whole number of hexadecimal
                                                        # digits
        self.check(rows())

    def test_plans_by_hand(self):
        import numpy
        import plot
        kept = plot.kept_of_plan("3102 3300", {}, numpy)
        self.assertEqual(kept.tolist(), [[1, 1], [1, 0.5], [0, 0], [0, 0.5]])
        kept = plot.kept_of_plan("f.7.1.f 3.f.f.e", {"kept_attn": (4 + 1 + 2 + 4) / 16,
            "kept_mlp": 14 / 16}, numpy)
        self.assertEqual(kept.tolist(), [[6 / 8, 7 / 8], [5 / 8, 7 / 8]])

    def test_nothing_dropped(self):
        import numpy
        import plot
        heat = plot.KeptMap(numpy)
        Run(base(), "base", heat.look)
        self.assertIsNone(heat.dropped())


@needs_matplotlib
class Drawing(unittest.TestCase):
    def draw(self, *arguments, expect=0):
        out = os.path.join(tempfile.mkdtemp(dir=real_runs.folder()), "picture")
        return out, real_runs.run(PLOT, *arguments, "--out", out, expect=expect)

    def test_all_of_a_set(self):
        out, text = self.draw(base(1), base(2), drop(1), drop(2), rows(), "--heat", "3")
        self.assertIn("picture.png", text)
        self.assertGreater(os.path.getsize(out + ".png"), 20000)
        words = svg_text(out + ".svg")
        for word in ("base (2 seeds: mean, range)", "drop (2 seeds: mean, range)", "rows",
                     "tokens per second",
                     "validation perplexity (per token)", "drop_s1: what was dropped",
                     "rows: what was dropped",
                     "drop rate p(layer, step)"):
            self.assertIn(word, words)
        self.assertNotIn("base_s1: what was dropped", words)
        self.assertEqual(sorted(os.listdir(os.path.dirname(out))), ["picture.png", "picture.svg"])

    def test_axes(self):
        out, _ = self.draw(base(), drop(), "--x", "steps,tokens,flops,seconds", "--y",
                           "val_loss,lr", "--heat", "0")
        words = svg_text(out + ".svg")
        for word in ("optimizer steps", "tokens", "executed FLOPs",
                     "training time without evaluation (s)",
                     "learning rate"):
            self.assertIn(word, words)
        self.assertNotIn("dropped", words)

    def test_axes_add_up(self):
        import plot
        run = Run(drop(), "drop")
        for x, key, unit in (("flops", "flops", 1), ("seconds", "ms", 1e-3)):
            curve = plot.read_curve(run, x, "val_loss")
            self.assertAlmostEqual(curve[40][0], sum(run.column(key)) * unit, places=6)
        self.assertEqual(plot.read_curve(run, "tokens", "val_loss")[10][0], 1600)

    def test_a_run_that_grows(self):
        folder = real_runs.trained("grown", "--layers", "3", "--grow", "1:0,3:50%", "--drop-path",
                                   "0.3")
        out, _ = self.draw(folder, "--y", "losses,layers", "--heat", "1")
        text = svg_text(out + ".svg")
        self.assertIn("3 layers", text)
        self.assertIn("layers that exist", text)
        run = Run(folder, "grown")
        self.assertEqual([run.column("layers")[step] for step in (0, 19, 20, 39)], [1, 1, 3, 3])

    def test_depths(self):
        folder = real_runs.trained("depths", "--layers", "4", "--eval-depths", "0.25,0.5")
        run = Run(folder, "depths")
        for kind in ("prefix", "even"):
            self.assertEqual(sum(map(math.isfinite, run.column(f"val_{kind}_0.25"))), 4)
        out, _ = self.draw(folder, base(), "--y", "val_prefix,val_even")
        text = svg_text(out + ".svg")
        for words in ("validation loss of the first layers", "evenly spaced layers",
                      "depths 0.25", "depths 0.5"):
            self.assertIn(words, text)

    def test_points_are_means(self):
        import plot
        group = [Run(base(seed), "base") for seed in (1, 2)]
        xs, ys, width = plot.read_group(group, "steps", "loss", 8)
        self.assertEqual((len(xs), xs[0], width), (5, 4.5, 8))
        self.assertAlmostEqual(ys[1][0], sum(group[1].column("loss")[:8]) / 8)
        means = plot.bins([1, 3, math.nan, math.nan, 6], 2, harmonic=True)
        self.assertEqual((means[0], math.isnan(means[1]), means[2]), (1.5, True, 6))

    def test_against_an_option(self):
        out, _ = self.draw(base(1), base(2), drop(1), drop(2), "--by", "drop-path")
        self.assertIn("--drop-path", svg_text(out + ".svg"))
        self.assertIn("no number with that name", self.draw(base(), "--by", "dropp", expect=1)[1])

    def test_a_long_run_is_thinned(self):
        path = os.path.join(tempfile.mkdtemp(dir=real_runs.folder()), "metrics.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for step in range(1, 30001):
                record = {"step": step, "tokens": step, "loss": 3, "flops": 1, "ms": 1,
                          "plan": "3310 3333"}
                file.write(json.dumps(record) + "\n")
        out, _ = self.draw(path, "--y", "loss", "--smooth", "1")
        self.assertLess(os.path.getsize(out + ".svg"), 200000)


def study_report(**changes):
    """A report.json of build/study with two arms, of which one has no final runs yet."""
    arm = {"name": "none", "tuned": "lr=0.01", "mean": 1.5, "flops": 4e12, "difference": None,
           "differences": [], "t_low": None, "t_high": None, "bootstrap_low": None,
           "bootstrap_high": None, "tuning": [["lr=0.01", 1.5], ["lr=0.02", 1.6]]}
    drop = dict(arm, name="drop", mean=1.47, difference=-0.03, differences=[-0.02, -0.04],
                t_low=-0.05, t_high=-0.01, bootstrap_low=-0.04, bootstrap_high=-0.02,
                tuning=[["lr=0.01", 1.48], ["lr=0.02", 1.47]])
    late = dict(arm, name="late", mean=None, flops=None, tuning=[])
    report = {"format": "droppath.c study 1", "endpoint": "val_loss", "baseline": "none",
              "margin": 0.0075, "budget_flops": [2e12, 4e12], "budget_losses": [1.6, 1.5],
              "arms": [arm, drop, late]}
    path = os.path.join(tempfile.mkdtemp(dir=real_runs.folder()), "report.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(dict(report, **changes), file)
    return path


class Studies(unittest.TestCase):
    @needs_matplotlib
    def test_a_report(self):
        path = study_report()
        out = os.path.join(os.path.dirname(path), "study.svg")
        real_runs.run(PLOT, "--study", "--out", out, path)
        text = svg_text(out)
        for words in ("drop", "late", "none", "val_loss minus none's, by seed", "tuned: --lr"):
            self.assertIn(words, text)

    @needs_matplotlib
    def test_depths(self):
        cells = [{"share": 0.5, "kept": kept, "mean": 1.7, "sd": sd}
                 for kept, sd in (("prefix", 0.1), ("even", None))]
        path = study_report()
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        uses = [{"of": of, "mean": mean, "sd": None} for of, mean in
                (("loss", 1.5), ("removed_0.25", 1.6), ("removed_0.5", 1.9), ("gain", 1.2))]
        for arm in report["arms"]:
            arm.update(depths=cells if arm["mean"] else [], sd=None,
                       uses=uses if arm["mean"] else [])
        path = study_report(arms=report["arms"])
        out = os.path.join(os.path.dirname(path), "study.svg")
        real_runs.run(PLOT, "--study", "--out", out, path)
        text = svg_text(out)
        self.assertIn("share of the layers: the first ones", text)
        self.assertIn("share of the layers: evenly spaced", text)
        self.assertIn("share of the layers: those that cost least removed", text)

    def test_refusals(self):
        said = real_runs.run(PLOT, "--study", study_report(format="another"), expect=1)
        self.assertIn("not a report.json of build/study", said)
        said = real_runs.run(PLOT, "--study", base() + "/metrics.jsonl", expect=1)
        self.assertIn("cannot read", said)


class Refusals(unittest.TestCase):
    @needs_matplotlib
    def test_messages(self):
        empty = tempfile.mkdtemp(dir=real_runs.folder())
        for arguments, message in (((empty + "/none",), "cannot read .*none/metrics.jsonl"),
                                   ((empty,), "no run found"),
                                   ((base(), "--out", "x.jpg"), "must end in .png"),
                                   ((base(), "--out", empty + "/no/x.png"),
                                    "cannot write .*/no/x.png")):
            self.assertRegex(real_runs.run(PLOT, *arguments, expect=1), message)
        for arguments, message in ((("--y", "lss"), "'lss' is not one of"),
                                   (("--smooth", "0"), "at least 1"),
                                   (("--x", "step"), "is not one of steps, tokens")):
            self.assertIn(message, real_runs.run(PLOT, base(), *arguments, expect=2))

    def test_without_matplotlib(self):
        hidden = tempfile.mkdtemp(dir=real_runs.folder())
        with open(os.path.join(hidden, "matplotlib.py"), "w", encoding="utf-8") as file:
            file.write("raise ImportError('hidden')\n")
        text = real_runs.run(PLOT, base(), "--out", hidden + "/x.png", expect=1,
                             env={"PYTHONPATH": hidden})
        self.assertIn("matplotlib is missing: python3 -m pip install matplotlib", text)
        self.assertIn("| base_s1 |", real_runs.run(PLOT, base(), "--table",
                                                   env={"PYTHONPATH": hidden}))

    def test_table(self):
        table = [line.split("|") for line in
                 real_runs.run(PLOT, base(1), base(2), drop(1), drop(2), "--table").splitlines()]
        self.assertEqual([row[1].strip() for row in table[2:]], ["base", "drop"])
        losses = [[Run(f(seed), "r").last("val_loss") for seed in (1, 2)] for f in (base, drop)]
        self.assertIn(f"{sum(losses[0]) / 2:.4f} (sd ", table[2][6])
        difference = (losses[1][0] - losses[0][0] + losses[1][1] - losses[0][1]) / 2
        both = [losses[1][k] - losses[0][k] for k in (0, 1)]
        half = 12.7062 * abs(both[0] - both[1]) / 2      # of two seeds: the standard error is half
                                                         # their distance
        self.assertIn(f"{difference:+.4f} ± {half:.4f}", table[3][9])
        self.assertIn("95% t-interval", table[0][9])

    def test_baseline_drops_nothing(self):
        for order in ((base(1), drop(1)), (drop(1), base(1))):
            self.assertIn("minus base_s1's", real_runs.run(PLOT, *order, "--table"))

    def test_an_arm_keeps_its_color(self):
        import plot
        b, d, r = ([Run(path, os.path.basename(path))] for path in (base(), drop(), rows()))
        self.assertEqual(plot.styles([b, d, r])[::-1], plot.styles([r, d, b]))
        self.assertEqual(plot.styles([d]), plot.styles([b, d])[1:])
        self.assertEqual(plot.styles([b])[0][0], "black")

    def test_t_95(self):
        import plot
        for freedom, t in ((1, 12.706), (4, 2.776), (10, 2.228), (30, 2.042), (1000, 1.962)):
            self.assertLess(abs(plot.t_95(freedom) - t), 0.005)


if __name__ == "__main__":
    unittest.main()
