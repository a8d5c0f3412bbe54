"""A sweep: methods over the levels of several axes and over seeds, as Markdown, CSV, JSON and a figure."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.statistics import (
    PairedDifference,
    Summary,
    holm,
    p_value,
    paired_difference,
    summarise,
)
from pipeline.storage.files import write_json, write_text

FIGURES = ("top1", "top5", "nll", "ece", "seconds", "memory_mib")
Results = list[dict[str, float]]  # by seed


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
class Contrast:
    """A difference in top-1, `method` − `against`, paired by seed."""

    name: str
    method: str
    against: str


@dataclass(frozen=True)
class Sweep:
    """All of a sweep.

    Attributes:
        title: heading.
        seeds: in the order of all results.
        axes: of the figure, from left to right.
        methods: key → name for people, in the order of the tables.
        results: point → method → by seed: top1, top5, nll, ece, seconds, memory_mib.
        contrasts: the question; they are drawn, and judged together.
        others: further differences, for the tables alone.
        reference: a name and results that no level changes; a line in the figure.
        notes: paragraphs below the tables.
        command: that makes it.
        extra: further figures, for the JSON.
    """

    title: str
    seeds: list[int]
    axes: tuple[Axis, ...]
    methods: dict[str, str]
    results: dict[str, dict[str, Results]]
    contrasts: tuple[Contrast, ...]
    others: tuple[Contrast, ...]
    reference: tuple[str, Results] | None
    notes: list[str]
    command: str
    extra: dict[str, Any]

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write STEM.md, which shows STEM.png (`sweep_figure`), .csv and .json; returns their paths."""
        paths = [folder / f"{stem}.{suffix}" for suffix in ("md", "csv", "json")]
        write_text(paths[0], self.markdown(f"{stem}.png"))
        write_text(paths[1], self.csv())
        write_json(paths[2], self.as_json())
        return paths

    def points(self) -> list[str]:
        """Every point once, in the order of the axes."""
        return list(dict.fromkeys(level.point for axis in self.axes for level in axis.levels))

    def top1(self, point: str, method: str) -> list[float]:
        """Percent, by seed."""
        return [result["top1"] for result in self.results[point][method]]

    def summary(self, point: str, method: str) -> Summary:
        """Top-1 over seeds."""
        return summarise(self.top1(point, method))

    def difference(self, contrast: Contrast, point: str) -> PairedDifference:
        """The contrast at one point, in points of top-1."""
        return paired_difference(self.top1(point, contrast.method), self.top1(point, contrast.against))

    def growth(self, contrast: Contrast, axis: Axis) -> PairedDifference:
        """How much more the contrast is at the axis's last level than at its first."""

        def by_seed(point: str) -> list[float]:
            pairs = zip(self.top1(point, contrast.method), self.top1(point, contrast.against), strict=True)
            return [a - b for a, b in pairs]

        return paired_difference(by_seed(axis.levels[-1].point), by_seed(axis.levels[0].point))

    def adjusted(self) -> list[float]:
        """p of every contrast at every point, adjusted for their number (Holm 1979)."""
        return holm([p_value(self.difference(c, point)) for c in self.contrasts for point in self.points()])

    def certain(self) -> set[tuple[str, str]]:
        """(contrast's name, point) that differ from zero at 5% over all of them together."""
        tests = [(c.name, point) for c in self.contrasts for point in self.points()]
        return {test for test, p in zip(tests, self.adjusted(), strict=True) if p <= 0.05}

    def markdown(self, figure: str) -> str:
        """For people: the answer, the figure, a table for each axis."""
        n, tests = len(self.seeds), len(self.contrasts) * len(self.points())
        intervals = (len(self.contrasts) + len(self.others)) * (len(self.points()) + len(self.axes))
        parts = [f"# {self.title}", *self.answers(), f"![{self.title}]({figure})"]
        parts += [self._table(axis) for axis in self.axes]
        parts.append(
            f"n = {n} seed{'s' * (n != 1)} ({', '.join(map(str, self.seeds))}). Methods: top-1 in %, mean ± standard "
            "deviation. Differences: points of top-1, paired by seed, with the 95% interval of the t-distribution; "
            f"**bold** where it excludes zero. Each interval stands for itself: of {intervals} about "
            f"{0.05 * intervals:.0f} would exclude zero by chance alone. † marks, of the {tests} comparisons with and "
            "without feedback, what differs from zero at 5% over all of them together (Holm)."
        )
        parts += [*self.notes, f"Made by `{self.command}`.", ""]
        return "\n\n".join(parts)

    def answers(self) -> list[str]:
        """A paragraph for each contrast: where its interval lies above zero, where below, where it has zero in it."""
        places, certain = self._places(), self.certain()
        lines = []
        for contrast in self.contrasts:
            found: dict[str, list[str]] = {"above zero": [], "below zero": [], "not told from zero": []}
            for point, place in places.items():
                d = self.difference(contrast, point)
                above, below = d.low is not None and d.low > 0, d.high is not None and d.high < 0
                kind = "above zero" if above else "below zero" if below else "not told from zero"
                found[kind].append(f"{place} ({d.mean:+.2f}{'†' * ((contrast.name, point) in certain)})")
            text = "; ".join(f"*{kind}:* {', '.join(where)}" for kind, where in found.items() if where)
            lines.append(f"**{contrast.name}** ({self._formula(contrast)}): {text}.")
        return lines

    def _places(self) -> dict[str, str]:
        """Point → how it is called in a sentence."""
        every = [level.point for axis in self.axes for level in axis.levels]
        return {
            level.point: "common origin" if every.count(level.point) > 1 else f"{axis.short} {level.text}"
            for axis in self.axes
            for level in axis.levels
        }

    def csv(self) -> str:
        """One line per point, method and seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["point", "method", "seed", *FIGURES])
        for point in self.points():
            for method in self.methods:
                for seed, result in zip(self.seeds, self.results[point][method], strict=True):
                    writer.writerow([point, method, seed, *(result[key] for key in FIGURES)])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        tests = [(c.name, point) for c in self.contrasts for point in self.points()]
        adjusted = dict(zip(tests, self.adjusted(), strict=True))
        differences = [
            {"contrast": c.name, "method": c.method, "against": c.against, "point": point}
            | vars(self.difference(c, point))
            | ({"p_holm": adjusted[c.name, point]} if c in self.contrasts else {})
            for c in (*self.contrasts, *self.others)
            for point in self.points()
        ]
        growth = [
            {"contrast": c.name, "axis": axis.title} | vars(self.growth(c, axis))
            for c in (*self.contrasts, *self.others)
            for axis in self.axes
        ]
        reference = None if self.reference is None else {"name": self.reference[0], "results": self.reference[1]}
        return {
            "format": 1,
            "title": self.title,
            "command": self.command,
            "seeds": self.seeds,
            "axes": [asdict(axis) for axis in self.axes],
            "methods": self.methods,
            "results": self.results,
            "reference": reference,
            "differences": differences,
            "growth": growth,
            "notes": self.notes,
            **json.loads(json.dumps(self.extra)),
        }

    def _table(self, axis: Axis) -> str:
        head = [axis.title, *(level.text for level in axis.levels), "last − first"]
        lines = [_row(head), _row(["---"] * len(head))]
        for method, name in self.methods.items():
            lines.append(_row([name, *(str(self.summary(level.point, method)) for level in axis.levels), ""]))
        certain = self.certain()
        for contrast in (*self.contrasts, *self.others):
            cells = [
                _interval(self.difference(contrast, level.point)) + "†" * ((contrast.name, level.point) in certain)
                for level in axis.levels
            ]
            lines.append(_row([f"*{self._formula(contrast)}*", *cells, _interval(self.growth(contrast, axis))]))
        return "\n".join(lines)

    def _formula(self, contrast: Contrast) -> str:
        return f"{self.methods[contrast.method]} − {self.methods[contrast.against]}"


def _interval(d: PairedDifference) -> str:
    if d.low is None or d.high is None:
        return f"{d.mean:+.2f}"
    text = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
    return f"**{text}**" if d.low > 0 or d.high < 0 else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
