"""Draw the latency of every request of a deploy and a rollback; runs in the bench's own virtual environment.

plot.py DATA.json PICTURE.svg, where DATA is {"requests": [[second, milliseconds, kind, whether it failed], ..],
"bands": [[from, to, label], ..], "events": [[second, label], ..]}; seconds count from the begin of the deploy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl  # type: ignore[import-not-found] # it is in the environment of the bench alone

mpl.use("svg")
import matplotlib.pyplot as plt  # type: ignore[import-not-found]
from matplotlib.ticker import FuncFormatter  # type: ignore[import-not-found]

# Greys and colours of a contrast above 3 : 1 on white and on GitHub's dark background; the ground stays transparent.
INK = "#7d8590"
COLOURS = {"GET": "#2f81f7", "POST": "#d9730d"}
FAILED = "#e5484d"
BANDS = ("#8b949e", "#3fb950", "#a371f7", "#d29922")


def main() -> None:
    """Draw."""
    data = json.loads(Path(sys.argv[1]).read_text())
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bench",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    figure, axes = plt.subplots(figsize=(9.6, 4.4), layout="constrained")
    axes.set_yscale("log")
    for kind, colour in COLOURS.items():
        dots = [
            (second, latency) for second, latency, found, failed in data["requests"] if found == kind and not failed
        ]
        axes.scatter(*zip(*dots, strict=True), s=3, c=colour, alpha=0.5, linewidths=0, label=kind, rasterized=True)
    lost = [(second, max(latency, 0.1)) for second, latency, _, failed in data["requests"] if failed]
    if lost:
        axes.scatter(*zip(*lost, strict=True), s=26, c=FAILED, marker="x")
    axes.scatter([], [], s=26, c=FAILED, marker="x", label=f"failed: {len(lost)}")
    top = axes.get_ylim()[1]
    axes.set_ylim(top=top * 14)
    for number, (begin, end, label) in enumerate(data["bands"]):
        axes.axvspan(begin, end, color=BANDS[number % len(BANDS)], alpha=0.14, linewidth=0)
        axes.annotate(
            label,
            ((begin + end) / 2, 0.985),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            rotation=90,
            fontsize=8,
        )
    for second, label in data["events"]:
        axes.axvline(second, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(label, (second, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    axes.set_xlim(min(each[0] for each in data["requests"]), max(each[0] for each in data["requests"]))
    axes.set_xlabel("seconds since the deploy began")
    axes.set_ylabel("latency of a request, ms")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=3, frameon=False, markerscale=2, fontsize=9)
    figure.savefig(sys.argv[2], transparent=True, dpi=120, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
