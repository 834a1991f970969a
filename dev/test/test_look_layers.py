"""Tests of scripts/plot_layers.py on what build/layers has written."""
import json
import os
import unittest

import real_runs


class Layers(unittest.TestCase):
    def scores(self, *options):
        """A run with drop path, its scores as a file."""
        run = real_runs.trained("layers_s1", "--seed", "1", "--drop-path", "0.4", "--drop-sampling",
                                "bernoulli", "--record-micro")
        path = os.path.join(real_runs.folder(), f"layers{len(options)}.json")
        real_runs.run(os.path.join(real_runs.BUILD, "layers"), run, "--val", real_runs.data() +
                      "/val_*.bin", "--tokens", "500",
                      "--json", path, *options, run + "/metrics.jsonl")
        return path

    def test_draws(self):
        if not real_runs.have("matplotlib"):
            self.skipTest("no matplotlib")
        for options in (["--metrics"], ["--branches", "0", "--exits", "0", "--greedy", "0",
                                        "--metrics-last", "100%", "--metrics"]):
            path = self.scores(*options)
            real_runs.run("scripts/plot_layers.py", path)
            for kind in ("png", "svg"):
                self.assertGreater(os.path.getsize(f"{path[:-5]}.{kind}"), 10000)
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        del data["effects"]
        for layer in data["layers"]:                     # as of factors that tie branches
            for branch in ("attn", "mlp"):
                layer[branch] = dict.fromkeys(layer[branch])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(data, file)
        real_runs.run("scripts/plot_layers.py", path, "--out", os.path.join(real_runs.folder(),
            "tied"))

    def test_refuses(self):
        path = os.path.join(real_runs.folder(), "other.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write("{}")
        self.assertIn("not what build/layers --json writes", real_runs.run("scripts/plot_layers.py",
            path, expect=1))
        self.assertIn("/nowhere.json", real_runs.run("scripts/plot_layers.py", "/nowhere.json",
            expect=1))


if __name__ == "__main__":
    unittest.main()
