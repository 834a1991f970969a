"""Tests of scripts/plot_collapse.py, on what build/collapse writes of a real run."""
import os
import unittest
import xml.etree.ElementTree

import real_runs
from plot_collapse import read

PLOT = "scripts/plot_collapse.py"


def curve():
    """The CSV of three checkpoints."""
    run = real_runs.trained("collapse", "--save-every", "10", "--keep", "0")
    path = os.path.join(real_runs.folder(), "curve.csv")
    if not os.path.exists(path):
        shards = os.path.join(real_runs.data(), "{}_*.bin")
        real_runs.run(os.path.join(real_runs.BUILD, "collapse"), run, "--every", "20", "--train",
                      shards.format("train"),
                      "--val", shards.format("val"), "--tokens", "4000", "--val-tokens", "300",
                      "--csv", path)
    return path


def file_of(text):
    path = os.path.join(real_runs.folder(), "damaged.csv")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


class Collapse(unittest.TestCase):
    def test_columns(self):
        columns = read(curve())
        self.assertEqual(columns["step"], [20, 40])
        self.assertTrue(all(0 < v <= 1 for v in columns["coverage"] + columns["agreement"]))

    @unittest.skipUnless(real_runs.have("matplotlib"), "matplotlib is missing")
    def test_picture(self):
        out = os.path.join(real_runs.folder(), "collapse.svg")
        real_runs.run(PLOT, curve(), "--out", out)
        root = xml.etree.ElementTree.parse(out).getroot()
        text = "\n".join("".join(t.itertext())
                         for t in root.iter("{http://www.w3.org/2000/svg}text"))
        for panel in ("NC1: ", "NC2: ", "GNC2: ", "NC3: ", "NC4: ", "optimizer steps"):
            self.assertIn(panel, text)

    def test_damaged(self):
        with open(curve(), encoding="utf-8") as file:
            good = file.read()
        for text, message in (("", "not what build/collapse"),
                              ("a,b\n1,2\n", "not what build/collapse"),
                              (good.replace(",20,", ",,", 1), "without a step"),
                              (good.rsplit(",", 12)[0], "missing or damaged"),
                              (good.replace(",20,", ",x,", 1), "missing or damaged")):
            with self.assertRaisesRegex(SystemExit, message):
                read(file_of(text))


if __name__ == "__main__":
    unittest.main()
