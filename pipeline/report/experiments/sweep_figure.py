"""The figure of a sweep: above, what is asked, with its interval; below, the accuracies that it comes from."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline.report.experiments.sweep import Axis, Sweep
from pipeline.storage.files import whole_file

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: told apart by every eye
MARKERS = ("o", "s", "^", "D", "v")
GREY = "#555555"
WIDE, NAMES = 3.6, 2.7  # inches, of a column and of the names at the right
APART = 0.075  # of an axis's height, between two labels


def draw(sweep: Sweep, path: Path) -> None:
    """Write a PNG: two rows of panels, one column per axis; lines are named at their right end.

    Each panel has its own scale: what one axis does may be ten times what another does.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(sweep.axes)
    figure, panels = plt.subplots(
        2, columns, figsize=(WIDE * columns + NAMES, 7.2), squeeze=False, height_ratios=(1.15, 1)
    )
    figure.subplots_adjust(left=0.075, right=1 - NAMES / (WIDE * columns + NAMES), top=0.83, bottom=0.05, wspace=0.17)
    for column, axis in enumerate(sweep.axes):
        ends = _contrasts(panels[0, column], sweep, axis), _accuracies(panels[1, column], sweep, axis)
        for row in (0, 1):
            _dress(panels[row, column], axis)
        panels[0, column].set_title(axis.title, fontsize=11.5, loc="left", pad=10)
    panels[0, 0].set_ylabel("what feedback adds,\npoints of top-1")
    panels[1, 0].set_ylabel("top-1 on the test split, %")
    for row in (0, 1):
        _name(panels[row, -1], ends[row])
    figure.suptitle(sweep.title, x=0.075, y=0.975, ha="left", fontsize=16, fontweight="bold")
    n = len(sweep.seeds)
    how = f"mean over {n} seed{'s' * (n != 1)}; bars: 95% intervals of the difference, paired by seed"
    figure.text(0.075, 0.915, f"{how}; panels have their own scales", fontsize=10, color=GREY)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _contrasts(panel: Any, sweep: Sweep, axis: Axis) -> list[tuple[float, str, str]]:
    """Means with intervals; returns (height, text, colour) of each line's right end."""
    ends = []
    panel.axhline(0, color="black", linewidth=1, zorder=1)
    for place, contrast in enumerate(sweep.contrasts):
        found = [sweep.difference(contrast, level.point) for level in axis.levels]
        shift = 0.09 * (place - (len(sweep.contrasts) - 1) / 2)  # so that intervals lie side by side
        xs = [x + shift for x in range(len(found))]
        means = [d.mean for d in found]
        below = [0.0 if d.low is None else d.mean - d.low for d in found]
        above = [0.0 if d.high is None else d.high - d.mean for d in found]
        panel.errorbar(
            xs, means, yerr=[below, above], color=COLOURS[place], marker=MARKERS[place], markersize=6.5,
            linewidth=2, elinewidth=1.6, capsize=3.5, zorder=3 + place,
        )  # fmt: skip
        ends.append((means[-1], contrast.name, COLOURS[place]))
    return ends


def _accuracies(panel: Any, sweep: Sweep, axis: Axis) -> list[tuple[float, str, str]]:
    """Means by method: solid with what a contrast asks about, dashed and hollow without it."""
    ends = []
    looks: dict[str, dict[str, Any]] = {}
    for place, contrast in enumerate(sweep.contrasts):
        common = {"color": COLOURS[place], "marker": MARKERS[place]}
        looks[contrast.method] = common | {"linestyle": "-", "linewidth": 2}
        looks.setdefault(contrast.against, common | {"linestyle": "--", "linewidth": 1.4, "markerfacecolor": "white"})
    others = [method for method in sweep.methods if method not in looks]
    for method, (marker, style) in zip(others, cycle((("x", ":"), ("+", "-."))), strict=False):
        looks[method] = {"color": GREY, "marker": marker, "linestyle": style, "linewidth": 1.6}
    for method, name in sweep.methods.items():
        look = looks[method]
        means = [sweep.summary(level.point, method).mean for level in axis.levels]
        panel.plot(range(len(means)), means, markersize=5.5, **look)
        ends.append((means[-1], name, look["color"]))
    if sweep.reference is not None:
        name, results = sweep.reference
        mean = sum(result["top1"] for result in results) / len(results)
        panel.axhline(mean, color="0.6", linewidth=1.2, zorder=1)
        ends.append((mean, name, "0.45"))
    return ends


def _dress(panel: Any, axis: Axis) -> None:
    panel.set_xticks(range(len(axis.levels)), [level.text for level in axis.levels])
    panel.set_xlim(-0.35, len(axis.levels) - 0.65)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=0)
    panel.xaxis.label.set_fontsize(11)
    panel.yaxis.label.set_fontsize(11)


def _name(panel: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the panel at the heights of their lines, moved apart where they would touch."""
    low, high = panel.get_ylim()
    ordered = sorted(ends)
    heights = spread([(height - low) / (high - low) for height, _, _ in ordered], APART)
    for height, (end, text, colour) in zip(heights, ordered, strict=True):
        panel.annotate(
            text, xy=(1.0, (end - low) / (high - low)), xytext=(1.07, height), xycoords="axes fraction",
            textcoords="axes fraction", color=colour, fontsize=10, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Increasing heights moved as little as is needed to be `apart`: groups that touch are centred on their mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _span(groups[-1], apart)[0] < _span(groups[-2], apart)[1] + apart:
            last = groups.pop()
            groups[-1] += last
    return [low + apart * i for group in groups for low, _ in [_span(group, apart)] for i in range(len(group))]


def _span(group: Sequence[float], apart: float) -> tuple[float, float]:
    """Lowest and highest place of a group's labels."""
    middle, half = sum(group) / len(group), apart * (len(group) - 1) / 2
    return middle - half, middle + half
