"""Methods over the levels of several axes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.axes import AxesFigure, Axis, Level
from pipeline.report.experiments.markdown import figure_cells, seeds_text, table
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import FIGURES, Contrast, Results
from pipeline.report.experiments.statistics import PairedDifference, holm_adjusted, paired_difference


@dataclass(frozen=True)
class Sweep(Report):
    """A table for each axis.

    Attributes:
        axes: of the figure, from left to right.
        results: point → of the same methods.
        contrasts: the tested ones are the question, drawn and judged together; the others are for the tables alone.
        reference: one method that no level changes; a line in the figure.
    """

    axes: tuple[Axis, ...]
    results: dict[str, Results]
    contrasts: tuple[Contrast, ...]
    reference: Results

    @property
    def seeds(self) -> list[int]:
        return self.reference.seeds

    @property
    def labels(self) -> dict[str, str]:
        """Method → its name for people, in the order of the tables."""
        return next(iter(self.results.values())).labels

    @property
    def points(self) -> list[str]:
        """Every point once, in the order of the axes."""
        return list(dict.fromkeys(level.point for axis in self.axes for level in axis.levels))

    @property
    def questions(self) -> list[Contrast]:
        """The tested contrasts."""
        return [contrast for contrast in self.contrasts if contrast.tested]

    def growth(self, contrast: Contrast, axis: Axis) -> PairedDifference:
        """How much more the contrast is at the axis's last level than at its first."""

        def by_seed(level: Level) -> list[float]:
            results = self.results[level.point]
            pairs = zip(results.values(contrast.variant), results.values(contrast.against), strict=True)
            return [a - b for a, b in pairs]

        return paired_difference(by_seed(axis.levels[-1]), by_seed(axis.levels[0]))

    def adjusted(self) -> dict[tuple[str, str], float]:
        """(tested contrast's name, point) → its p, adjusted for their number."""
        tested: dict[tuple[str, str], PairedDifference] = {
            (contrast.name, point): self.results[point].difference(contrast)
            for contrast in self.questions
            for point in self.points
        }
        return holm_adjusted(tested)

    def certain(self) -> set[tuple[str, str]]:
        """(tested contrast's name, point) that differ from zero at 5% over all of them together."""
        return {test for test, p in self.adjusted().items() if p <= 0.05}

    def answers(self) -> list[str]:
        """A paragraph for each question: where its interval lies above zero, where below, where it has zero in it."""
        places, certain, paragraphs = self._places(), self.certain(), []
        for contrast in self.questions:
            kinds: dict[str, list[str]] = {"above zero": [], "below zero": [], "not told from zero": []}
            for point, place in places.items():
                d = self.results[point].difference(contrast)
                above, below = d.low is not None and d.low > 0, d.high is not None and d.high < 0
                kind = "above zero" if above else "below zero" if below else "not told from zero"
                kinds[kind].append(f"{place} ({d.mean:+.2f}{'†' * ((contrast.name, point) in certain)})")
            text = "; ".join(f"*{kind}:* {', '.join(where)}" for kind, where in kinds.items() if where)
            paragraphs.append(f"**{contrast.name}** ({self._formula(contrast)}): {text}.")
        return paragraphs

    def _places(self) -> dict[str, str]:
        """Point → how it is called in a sentence."""
        every = [level.point for axis in self.axes for level in axis.levels]
        return {
            level.point: "common origin" if every.count(level.point) > 1 else f"{axis.short} {level.text}"
            for axis in self.axes
            for level in axis.levels
        }

    def sections(self) -> Iterator[str]:
        yield from self.answers()
        yield self.figure(self.about.title)
        yield from (self._table(axis) for axis in self.axes)
        intervals, tests = len(self.contrasts) * (len(self.points) + len(self.axes)), len(self.adjusted())
        yield (
            f"{seeds_text(self.seeds)}. Methods: top-1 in %, mean ± standard "
            "deviation. Differences: points of top-1, paired by seed, with the 95% interval of the t-distribution; "
            f"**bold** where it excludes zero. Each interval stands for itself: of {intervals} about "
            f"{0.05 * intervals:.0f} would exclude zero by chance alone. † marks, of the {tests} comparisons with and "
            "without feedback, what differs from zero at 5% over all of them together (Holm)."
        )
        yield from self.about.notes

    def _table(self, axis: Axis) -> str:
        rows, certain = [], self.certain()
        for method, label in self.labels.items():
            cells = [cell for level in axis.levels for cell in figure_cells(self.results[level.point], method, "top1")]
            rows.append([label, *cells, ""])
        for contrast in self.contrasts:
            cells = [
                _interval(self.results[level.point].difference(contrast))
                + "†" * ((contrast.name, level.point) in certain)
                for level in axis.levels
            ]
            rows.append([f"*{self._formula(contrast)}*", *cells, _interval(self.growth(contrast, axis))])
        return table([axis.title, *(level.text for level in axis.levels), "last − first"], rows)

    def _formula(self, contrast: Contrast) -> str:
        return f"{self.labels[contrast.variant]} − {self.labels[contrast.against]}"

    def lines(self) -> Iterator[dict[str, Any]]:
        for point in self.points:
            for method in self.labels:
                yield from self.results[point].lines(method, FIGURES, point=point, method=method)

    def values(self) -> dict[str, Any]:
        adjusted = self.adjusted()
        ((reference, label),) = self.reference.labels.items()
        return {
            "axes": [asdict(axis) for axis in self.axes],
            "methods": self.labels,
            "results": {
                point: {method: results.by_seed(method) for method in self.labels}
                for point, results in self.results.items()
            },
            "reference": {"name": label, "results": self.reference.by_seed(reference)},
            "differences": [
                {"contrast": c.name, "method": c.variant, "against": c.against, "point": point}
                | vars(self.results[point].difference(c))
                | ({"p_holm": adjusted[c.name, point]} if c.tested else {})
                for c in self.contrasts
                for point in self.points
            ],
            "growth": [
                {"contrast": c.name, "axis": axis.title} | vars(self.growth(c, axis))
                for c in self.contrasts
                for axis in self.axes
            ],
        }

    def draw(self, path: Path) -> None:
        """Above, what is asked, with its interval; below, the accuracies that it comes from."""
        AxesFigure(self.about.title, self.axes, self.results, self.questions, self.reference).draw(path)


def _interval(d: PairedDifference) -> str:
    if d.low is None or d.high is None:
        return f"{d.mean:+.2f}"
    text = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
    return f"**{text}**" if d.low > 0 or d.high < 0 else text
