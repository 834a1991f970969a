#!/usr/bin/env python3
"""Writes stats.h, what SciPy computes for dev/tools/stats.h: tests, equivalence, power, bootstrap
intervals.

    pip install scipy
    python3 dev/golden/make_stats.py        # 10 s
"""
import os
import platform
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts"))
import script_errors  # noqa: E402,F401  # no exception escapes as a traceback
import numpy as np  # noqa: E402
import scipy  # noqa: E402
from scipy import optimize, stats  # noqa: E402

SAMPLES = {
    "three": [-0.036, -0.020, -0.028],
    "five": [0.0123, -0.0045, 0.0301, 0.0088, 0.0142],
    "skewed": [0.001, 0.002, 0.002, 0.003, 0.004, 0.004, 0.006, 0.009, 0.015, 0.041],
    "twelve": [-0.004, 0.011, 0.002, -0.013, 0.008, 0.001, -0.002, 0.006, 0.009, -0.007, 0.003,
               0.012],
}
MARGIN = 0.01


def power(effect, n, alpha):
    """Of the two-sided paired t-test, by the noncentral t distribution."""
    t = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = effect * np.sqrt(n)
    below = stats.nct.cdf(-t, n - 1, shift)              # NaN where it is smaller than any double
    return stats.nct.sf(t, n - 1, shift) + (0 if np.isnan(below) else below)


def row(values):
    return "{" + ", ".join(f"{v:.12g}" for v in values) + "}"


def main():
    out = [f"// stats.h: written by make_stats.py with Python {platform.python_version()}, SciPy "
           f"{scipy.__version__}, "
           f"NumPy {np.__version__}. Do not edit.", ""]
    out.append(f"#define GOLDEN_MARGIN {MARGIN}")
    out.append("static const struct { int n; double x[12], mean, low, high, p, equivalent, "
               "not_inferior, bca_low, bca_high; }")
    out.append("golden_samples[] = {")
    for x in SAMPLES.values():
        x = np.array(x)
        interval = stats.ttest_1samp(x, 0).confidence_interval(0.95)
        below = stats.ttest_1samp(x, MARGIN, alternative="less").pvalue
        above = stats.ttest_1samp(x, -MARGIN, alternative="greater").pvalue
        bca = stats.bootstrap((x,), np.mean, n_resamples=200000, method="BCa",
                              rng=np.random.default_rng(1)).confidence_interval
        numbers = [x.mean(), interval.low, interval.high, stats.ttest_1samp(x, 0).pvalue,
                   max(below, above), below,
                   bca.low, bca.high]
        out.append(f"    {{{len(x)}, {row(x)}, " + ", ".join(f"{v:.12g}" for v in numbers) + "},")
    out.append("};")
    out.append("static const struct { double effect; int n; double alpha, power; } golden_power[] "
               "= {")
    for effect in (0.2, 0.5, 1, 2):
        for n in (2, 3, 5, 8, 16, 35):
            for alpha in (0.05, 0.005):
                out.append(f"    {{{effect}, {n}, {alpha}, {power(effect, n, alpha):.12g}}},")
    out.append("};")
    out.append("static const struct { int n; double alpha, effect; } golden_smallest[] = { "
               "        // with a power of 0.8")
    for n, alpha in ((3, 0.05), (5, 0.05), (8, 0.05), (8, 0.005), (16, 0.05), (16, 0.005),
                     (35, 0.05)):
        effect = optimize.brentq(lambda e: power(e, n, alpha) - 0.8, 0.01, 4, xtol=1e-12)
        out.append(f"    {{{n}, {alpha}, {effect:.12g}}},")
    out.append("};")
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stats.h")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(out) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(f"error: unexpected argument {sys.argv[1]!r}\n  hint: this script has no options")
    main()
