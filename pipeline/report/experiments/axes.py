"""What varies in a sweep, and its figure: above, what is asked, with its interval; below, the accuracies behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline.report.experiments.figures import BLUE, GREEN, ORANGE, PINK, YELLOW, new_figure, plain, spread
from pipeline.report.experiments.results import Contrast, Results

COLOURS = (ORANGE, BLUE, GREEN, PINK, YELLOW)
MARKERS = ("o", "s", "^", "D", "v")
GREY = "#555555"
WIDE, NAMES = 3.6, 2.7  # inches, of a column and of the names at the right
LEAST, MARGIN = 7.2, 1.01  # inches, of all columns together, and left of them
APART = 0.075  # of a panel's height, between two labels
Ends = list[tuple[float, str, str]]  # (height, text, colour) of each line's right end


@dataclass(frozen=True)
class Level:
    """A level of an axis: how it reads, and the point of the sweep that it is. Axes may share a point."""

    text: str
    point: str


@dataclass(frozen=True)
class Axis:
    """What varies, from the first level to the last; `short` stands before a level's text in a sentence."""

    title: str
    short: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class AxesFigure:
    """Two rows of panels, one column per axis; lines are named at their right end.

    Each panel has its own scale: what one axis does may be ten times what another does.

    Attributes:
        title: above all.
        axes: from left to right.
        results: point → of the same methods.
        contrasts: what is asked.
        reference: one method that no level changes.
    """

    title: str
    axes: tuple[Axis, ...]
    results: dict[str, Results]
    contrasts: Sequence[Contrast]
    reference: Results

    def draw(self, path: Path) -> None:
        """Write a PNG."""
        width = max(WIDE * len(self.axes), LEAST) + NAMES
        left = MARGIN / width
        with new_figure(path, dpi=150, figsize=(width, 7.2)) as figure:
            upper, lower = figure.subplots(2, len(self.axes), squeeze=False, height_ratios=(1.15, 1))
            figure.subplots_adjust(left=left, right=1 - NAMES / width, top=0.83, bottom=0.05, wspace=0.17)
            for above, below, axis in zip(upper, lower, self.axes, strict=True):
                ends = {above: self._differences(above, axis), below: self._accuracies(below, axis)}
                for panel in ends:
                    panel.set_xticks(range(len(axis.levels)), [level.text for level in axis.levels])
                    panel.set_xlim(-0.35, len(axis.levels) - 0.65)
                    plain(panel)
                above.set_title(axis.title, fontsize=11.5, loc="left", pad=10)
            for panel, lines in ends.items():  # of the last axis
                _name(panel, lines)
            upper[0].set_ylabel("what feedback adds,\npoints of top-1", fontsize=11)
            lower[0].set_ylabel("top-1 on the test split, %", fontsize=11)
            figure.suptitle(self.title, x=left, y=0.975, ha="left", fontsize=16, fontweight="bold")
            n = len(self.reference.seeds)
            how = f"mean over {n} seed{'s' * (n != 1)}; bars: 95% intervals of the difference, paired by seed"
            figure.text(left, 0.915, f"{how}; panels have their own scales", fontsize=10, color=GREY)

    def _differences(self, panel: Any, axis: Axis) -> Ends:
        """Means with intervals."""
        ends = []
        panel.axhline(0, color="black", linewidth=1, zorder=1)
        for place, contrast in enumerate(self.contrasts):
            differences = [self.results[level.point].difference(contrast) for level in axis.levels]
            shift = 0.09 * (place - (len(self.contrasts) - 1) / 2)  # so that intervals lie side by side
            xs = [x + shift for x in range(len(differences))]
            means = [d.mean for d in differences]
            below = [0.0 if d.low is None else d.mean - d.low for d in differences]
            above = [0.0 if d.high is None else d.high - d.mean for d in differences]
            panel.errorbar(
                xs, means, yerr=[below, above], color=COLOURS[place], marker=MARKERS[place], markersize=6.5,
                linewidth=2, elinewidth=1.6, capsize=3.5, zorder=3 + place,
            )  # fmt: skip
            ends.append((means[-1], contrast.name, COLOURS[place]))
        return ends

    def _accuracies(self, panel: Any, axis: Axis) -> Ends:
        """Means by method: solid with what a contrast asks about, dashed and hollow without it."""
        ends, looks = [], self._looks()
        for method, name in self.results[axis.levels[0].point].labels.items():
            means = [self.results[level.point].summary(method).mean for level in axis.levels]
            panel.plot(range(len(means)), means, markersize=5.5, **looks[method])
            ends.append((means[-1], name, looks[method]["color"]))
        for method, name in self.reference.labels.items():
            mean = self.reference.summary(method).mean
            panel.axhline(mean, color="0.6", linewidth=1.2, zorder=1)
            ends.append((mean, name, "0.45"))
        return ends

    def _looks(self) -> dict[str, dict[str, Any]]:
        looks: dict[str, dict[str, Any]] = {}
        for place, contrast in enumerate(self.contrasts):
            own = {"color": COLOURS[place], "marker": MARKERS[place]}
            looks[contrast.variant] = own | {"linestyle": "-", "linewidth": 2}
            looks.setdefault(contrast.against, own | {"linestyle": "--", "linewidth": 1.4, "markerfacecolor": "white"})
        methods = next(iter(self.results.values())).labels
        others = [method for method in methods if method not in looks]
        for method, (marker, style) in zip(others, cycle((("x", ":"), ("+", "-."))), strict=False):
            looks[method] = {"color": GREY, "marker": marker, "linestyle": style, "linewidth": 1.6}
        return looks


def _name(panel: Any, ends: Ends) -> None:
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
