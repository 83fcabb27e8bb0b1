"""Plots as SVG text: in the colours of a page that has them, or in ones that stand on light and
dark ground alike."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Tree = dict[str, Any]

# What matplotlib writes as these colours becomes a page's own.
TEXT, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404"
PAGE = {TEXT: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
ALONE = {TEXT: "#6b7280", LINE: "#b6bcc6", ACCENT: "#3b76f0", SECOND: "#d9650b"}
_STYLE: Any = {
    "svg.fonttype": "none",
    # A label with a dollar sign is no formula.
    "text.parse_math": False,
    "font.size": 10.5,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), TEXT),
    **dict.fromkeys(("grid.color", "axes.edgecolor"), LINE),
}


def svg(draw: Callable[[Any], None], colours: dict[str, str], height: float = 2.75) -> str:
    """What `draw` puts on a pair of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        draw(figure.subplots())
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=empty)
    # Names such as axes_1 are in every figure; on one page an id is there once.
    text = re.sub(r' id="[\w.]+_\d+"', "", "<svg" + out.getvalue().partition("<svg")[2])
    for colour, ours in colours.items():
        text = text.replace(colour, ours)
    return text


def reliability(calibration: Tree, axes: Any) -> None:
    """Accuracy against confidence: on the diagonal, confidence can be believed."""
    bins = calibration["bins"]
    rows = sum(one["rows"] for one in bins)
    middles = [(one["low"] + one["high"]) / 2 for one in bins]
    width = bins[0]["high"] - bins[0]["low"]
    accuracies = [one["accuracy"] for one in bins]
    axes.bar(middles, accuracies, 0.9 * width, color=ACCENT, alpha=0.75, label="accuracy")
    shares = [one["rows"] / rows for one in bins]
    axes.plot(middles, shares, ".-", color=SECOND, label="share of rows")
    axes.plot([0, 1], [0, 1], "--", color=TEXT, linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def flips(probe: Tree, axes: Any) -> None:
    """A line per pair of groups: the share of pairs whose label flips, with its interval."""
    pairs = probe["pairs"][::-1]  # the first on top
    lows, highs = zip(*(one["flips_interval"] for one in pairs), strict=True)
    axes.hlines(range(len(pairs)), *(100 * np.array([lows, highs])), color=ACCENT)
    axes.plot([100 * one["flips"] for one in pairs], range(len(pairs)), "o", color=ACCENT)
    axes.axvline(100 * probe["max_flips"], color=SECOND, linestyle="--", linewidth=1)
    names = [f"{one['a']} / {one['b']}" for one in pairs]
    axes.set_yticks(range(len(pairs)), [n if len(n) <= 30 else n[:29] + "…" for n in names])
    axes.set(xlim=(-1, None), ylim=(-0.6, len(pairs) - 0.4), xlabel="pairs that flip, %")


def flips_height(probe: Tree) -> float:
    """Inches."""
    return 0.9 + 0.28 * len(probe["pairs"])
