"""The two moons: a table of settings and methods, cosines of gradients, differences between cells."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.moons.settings import EVERY, LABELS, MethodName
from pipeline.moons.study import CellResult, Row
from pipeline.report.experiments.markdown import decimals, table
from pipeline.report.experiments.moons_figure import draw_moons
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import Contrast
from pipeline.report.experiments.statistics import paired_difference, summarise

FINAL = "working"  # the row whose methods are compared pair by pair
CONTRASTS = (  # between cells, "row/method"
    Contrast("MPL − Supervised", f"{FINAL}/mpl", f"{FINAL}/supervised"),
    Contrast("MPL − Pseudo Labels", f"{FINAL}/mpl", f"{FINAL}/pseudo_labels"),
    Contrast("MPL − MPL, no feedback", f"{FINAL}/mpl", "off/mpl"),
    Contrast("MPL − MPL, sign flipped", f"{FINAL}/mpl", "flipped/mpl"),
    Contrast("MPL + UDA − MPL + UDA, no feedback", f"{FINAL}/mpl_uda", "off/mpl_uda"),
    Contrast("MPL + UDA − MPL", f"{FINAL}/mpl_uda", f"{FINAL}/mpl"),
    Contrast("MPL + UDA − UDA", f"{FINAL}/mpl_uda", f"{FINAL}/uda"),
)


@dataclass(frozen=True)
class MoonsReport(Report):
    """A row for each settings, a column for each method.

    Attributes:
        study: rows, in the order of the table.
        results: by "row/method".
        draws: their numbers.
    """

    study: list[Row]
    results: dict[str, CellResult]
    draws: Sequence[int]

    @property
    def seeds(self) -> Sequence[int]:
        return self.draws

    def result(self, row: Row, method: MethodName) -> CellResult | None:
        """Of a cell, where it was asked for."""
        return self.results.get(f"{row.name}/{method}")

    def separated(self, cell: str) -> list[bool]:
        """Whether each draw was, by "row/method"."""
        (row,) = [row for row in self.study if row.name == cell.split("/")[0]]
        return self.results[cell].successes(row.settings)

    def successes(self) -> dict[str, int]:
        """Draws that were separated, by "row/method"."""
        return {cell: sum(self.separated(cell)) for cell in self.results}

    def sections(self) -> Iterator[str]:
        first = self.study[0].settings
        yield (
            f"Draws of {len(self.draws)} in which the student is right on at least {100 * first.success:.0f}% of all "
            f"{first.points:,} points; below, its accuracy in percent, mean ± standard deviation over the draws."
        )
        yield from self._table("networks", EVERY, "settings of all networks")
        yield from self._table("feedback", ("mpl", "mpl_uda"), "feedback, in the last row's settings")
        yield from self._cosines()
        yield from self._differences()
        yield self._settings()
        yield self._between()
        yield from self._plateaus()
        yield self.figure("decision regions, accuracies and cosines of gradients")

    def _table(self, part: str, methods: tuple[MethodName, ...], head: str) -> Iterator[str]:
        rows = [
            [row.label, f"{row.settings.steps:,}", *(self._cell(row, method) for method in methods)]
            for row in self.study
            if row.part == part
        ]
        if rows:
            yield table([head, "steps", *(LABELS[method] for method in methods)], rows)

    def _cell(self, row: Row, method: MethodName) -> str:
        result = self.result(row, method)
        if result is None:
            return "–"
        return f"**{sum(result.successes(row.settings))}**; {decimals(summarise(result.accuracy), 1)}"

    def _cosines(self) -> Iterator[str]:
        """Figure 8 as numbers: the second half of the training, mean ± standard deviation over draws."""
        rows = []
        for row, extra in ((FINAL, ""), ("off", ", no feedback")):
            for method in EVERY:
                result = self.results.get(f"{row}/{method}")
                if result is not None:
                    curves = (result.cosine_labelled, result.cosine_true)
                    rows.append([LABELS[method] + extra, *(str(summarise(second_half(c).tolist())) for c in curves)])
        if rows:
            head = "cosine of the student's training gradient with its gradient on …, second half of the training"
            yield table([head, "the six labels", "all true labels"], rows)
        on, off = self.results.get(f"{FINAL}/mpl"), self.results.get("off/mpl")
        if on is not None and off is not None:
            a, b = (second_half(result.cosine_labelled).tolist() for result in (on, off))
            yield f"**MPL − MPL, no feedback**, cosine with the six labels: {paired_difference(a, b)}."

    def _differences(self) -> Iterator[str]:
        for contrast in CONTRASTS:
            if contrast.variant not in self.results or contrast.against not in self.results:
                continue
            accuracies = (self.results[cell].accuracy for cell in (contrast.variant, contrast.against))
            won, lost, p = discordant(self.separated(contrast.variant), self.separated(contrast.against))
            yield (
                f"**{contrast.name}**: {paired_difference(*accuracies)} (points of "
                f"accuracy); separates {won} draw{'s' * (won != 1)} that the other does not, and the other {lost} "
                f"(exact sign test: p = {p:.3f})."
            )

    def _settings(self) -> str:
        s = self.study[0].settings
        return (
            f"Networks: two hidden layers of {s.hidden} sigmoid units, two outputs; plain SGD without regularisation, "
            f"{s.batch} unlabelled points and all {2 * s.labelled} labelled ones a step, as many steps for every "
            f"network. Noise of the moons: {s.noise:g}. Pseudo Labels: the student of a supervised network's hard "
            "labels. MPL: soft labels and equation 3, the teacher also learns from the six labels; judged is the "
            f"student, which never does. UDA: weight {s.consistency_weight:g}, points moved by "
            f"{s.consistency_noise:g}, temperature {s.temperature:g}; MPL + UDA: a teacher with that term."
        )

    def _between(self) -> str:
        every = [value for result in self.results.values() for value in result.accuracy]
        limit = 100 * self.study[0].settings.success
        between = sum(90 < value < limit for value in every)
        return (
            f"Where to draw the line matters little: {between} of all {len(every):,} students end between 90% and "
            f"{limit:.0f}%."
        )

    def _plateaus(self) -> Iterator[str]:
        items = []
        for row in self.study:
            all_labels, mpl = self.result(row, "all_labels"), self.result(row, "mpl")
            if row.part != "networks" or all_labels is None:
                continue
            item = f"- {row.label}: the network of all labels after {left_plateau(all_labels)}"
            items.append(item if mpl is None else f"{item}, MPL's student after {left_plateau(mpl)}")
        if items:
            yield (
                "Steps until the loss on the six labels is below 0.6 nats (knowing nothing is 0.69), median of the "
                "draws:"
            )
            yield "\n".join(items)

    def lines(self) -> Iterator[dict[str, Any]]:
        for row in self.study:
            for method in row.methods:
                result = self.results[f"{row.name}/{method}"]
                for d, (draw, separated) in enumerate(zip(self.draws, result.successes(row.settings), strict=True)):
                    yield {
                        "settings": row.name,
                        "method": method,
                        "draw": draw,
                        "accuracy": result.accuracy[d],
                        "teacher_accuracy": result.teacher_accuracy[d] if result.teacher_accuracy else "",
                        "separated": int(separated),
                        "cosine_labelled": round(float(result.cosine_labelled[-1, d]), 4),
                        "cosine_true": round(float(result.cosine_true[-1, d]), 4),
                    }

    def values(self) -> dict[str, Any]:
        """Everything but the pictures; curves are means over draws."""
        return {
            "draws": len(self.draws),
            "first_draw": self.draws[0],
            "rows": {
                row.name: {
                    "label": row.label,
                    "settings": row.settings.model_dump(mode="json"),
                    "methods": {method: self._cell_json(row, method) for method in row.methods},
                }
                for row in self.study
            },
            "differences": list(self._differences()),
        }

    def _cell_json(self, row: Row, method: MethodName) -> dict[str, Any]:
        result = self.results[f"{row.name}/{method}"]
        curves = {
            "accuracy": result.curve, "labelled_loss": result.labelled_loss,
            "cosine_labelled": result.cosine_labelled, "cosine_true": result.cosine_true,
        }  # fmt: skip
        return {
            "separated": sum(result.successes(row.settings)),
            "accuracy": result.accuracy,
            "teacher_accuracy": result.teacher_accuracy,
            "summary": vars(summarise(result.accuracy)),
            "steps": result.steps,
            "mean_curves": {name: np.round(values.mean(axis=1), 5).tolist() for name, values in curves.items()},
        }

    def draw(self, path: Path) -> None:
        """Decision regions, accuracies, cosines."""
        draw_moons(self.study, self.results, self.draws[0], path)


def discordant(a: list[bool], b: list[bool]) -> tuple[int, int, float]:
    """Draws that only a separates, those that only b does, and p of the two-sided exact sign test on them."""
    won = sum(x and not y for x, y in zip(a, b, strict=True))
    lost = sum(y and not x for x, y in zip(a, b, strict=True))
    return won, lost, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def second_half(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the second half of the looks, (L, D) → (D,)."""
    return curves[len(curves) // 2 :].mean(axis=0)


def left_plateau(result: CellResult, below: float = 0.6) -> str:
    """Step of the first look at which the loss on the six labels is below, median over draws, as text."""
    first: list[float] = []
    for losses in result.labelled_loss.T:
        under = np.flatnonzero(losses < below)
        first.append(result.steps[under[0]] if len(under) else np.inf)
    median = float(np.median(first))
    return f"{median:,.0f}" if np.isfinite(median) else f"more than {result.steps[-1]:,}"
