"""The two moons as a table, and its sentences."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.moons.settings import EVERY, LABELS, MethodName
from pipeline.moons.study import CellResult, Row
from pipeline.report.experiments.statistics import paired_difference, summarise
from pipeline.storage.files import write_json, write_text

FINAL = "working"  # the row whose methods are compared pair by pair
COMPARED: tuple[tuple[MethodName, str, MethodName, str], ...] = (  # a at row, minus b at row
    ("mpl", FINAL, "supervised", FINAL),
    ("mpl", FINAL, "pseudo_labels", FINAL),
    ("mpl", FINAL, "mpl", "off"),
    ("mpl", FINAL, "mpl", "flipped"),
    ("mpl_uda", FINAL, "mpl_uda", "off"),
    ("mpl_uda", FINAL, "mpl", FINAL),
    ("mpl_uda", FINAL, "uda", FINAL),
)


@dataclass(frozen=True)
class MoonsReport:
    """All that was found.

    Attributes:
        study: rows, in the order of the table.
        results: by "row/method".
        draws: their numbers.
        command: that made it.
    """

    study: list[Row]
    results: dict[str, CellResult]
    draws: Sequence[int]
    command: str

    def write(self, folder: Path, stem: str) -> None:
        """Write STEM.md, .csv, .json and .png."""
        from pipeline.report.experiments.moons_figure import draw

        write_text(folder / f"{stem}.md", self.markdown(f"{stem}.png"))
        write_text(folder / f"{stem}.csv", self.csv())
        write_json(folder / f"{stem}.json", self.as_json())
        draw(self.study, self.results, self.draws[0], folder / f"{stem}.png")

    def result(self, row: Row, method: MethodName) -> CellResult | None:
        """Of a cell, where it was asked for."""
        return self.results.get(f"{row.name}/{method}")

    def successes(self) -> dict[str, int]:
        """Draws that were separated, by "row/method"."""
        settings = {row.name: row.settings for row in self.study}
        return {name: sum(r.successes(settings[name.split("/")[0]])) for name, r in self.results.items()}

    def markdown(self, figure: str) -> str:
        """For people."""
        first = self.study[0].settings
        lines = [
            "# Two moons",
            "",
            f"Draws of {len(self.draws)} in which the student is right on at least {100 * first.success:.0f}% of all "
            f"{first.points:,} points; below, its accuracy in percent, mean ± standard deviation over the draws.",
            "",
            *self._table("networks", EVERY, "settings of all networks"),
        ]
        feedback = self._table("feedback", ("mpl", "mpl_uda"), "feedback, in the last row's settings")
        lines += ["", *feedback] if feedback else []
        cosines = self._cosines()
        lines += ["", *cosines] if cosines else []
        for text in self._differences():
            lines += ["", text]
        for note in self._notes():
            lines += ["", note]
        lines += ["", f"![decision regions, accuracies and cosines of gradients]({figure})", ""]
        lines += [f"Made by `{self.command}`.", ""]
        return "\n".join(lines)

    def _table(self, part: str, methods: tuple[MethodName, ...], head: str) -> list[str]:
        chosen = [row for row in self.study if row.part == part]
        if not chosen:
            return []
        lines = [
            f"| {head} | steps | " + " | ".join(LABELS[m] for m in methods) + " |",
            "| --- " * (2 + len(methods)) + "|",
        ]
        for row in chosen:
            cells = [self._cell(row, method) for method in methods]
            lines.append(f"| {row.label} | {row.settings.steps:,} | " + " | ".join(cells) + " |")
        return lines

    def _cell(self, row: Row, method: MethodName) -> str:
        found = self.result(row, method)
        if found is None:
            return "–"
        each = summarise(found.accuracy)
        spread = "" if each.std is None else f" ± {each.std:.1f}"
        return f"**{sum(found.successes(row.settings))}**; {each.mean:.1f}{spread}"

    def _cosines(self) -> list[str]:
        """Figure 8 as numbers: the second half of the training, mean ± standard deviation over draws."""
        chosen = [
            (name, m, LABELS[m] + extra) for name, extra in ((FINAL, ""), ("off", ", no feedback")) for m in EVERY
        ]
        head = "cosine of the student's training gradient with its gradient on …, second half of the training"
        lines = [f"| {head} | the six labels | all true labels |", "| --- | --- | --- |"]
        for name, method, label in chosen:
            result = self.results.get(f"{name}/{method}")
            if result is not None:
                each = [str(summarise(second_half(c).tolist())) for c in (result.cosine_labelled, result.cosine_true)]
                lines.append(f"| {label} | {each[0]} | {each[1]} |")
        on, off = self.results.get(f"{FINAL}/mpl"), self.results.get("off/mpl")
        if on is not None and off is not None:
            pair = [second_half(result.cosine_labelled).tolist() for result in (on, off)]
            lines += ["", f"**MPL − MPL, no feedback**, cosine with the six labels: {paired_difference(*pair)}."]
        return lines if len(lines) > 2 else []

    def _differences(self) -> list[str]:
        rows, found = {row.name: row for row in self.study}, []
        for a, row_a, b, row_b in COMPARED:
            first, second = self.results.get(f"{row_a}/{a}"), self.results.get(f"{row_b}/{b}")
            if first is None or second is None:
                continue
            labels = [LABELS[m] + ("" if r == FINAL else f", {rows[r].label}") for m, r in ((a, row_a), (b, row_b))]
            won, lost, p = discordant(first.successes(rows[row_a].settings), second.successes(rows[row_b].settings))
            found.append(
                f"**{labels[0]} − {labels[1]}**: {paired_difference(first.accuracy, second.accuracy)} (points of "
                f"accuracy); separates {won} draw{'s' * (won != 1)} that the other does not, and the other {lost} "
                f"(exact sign test: p = {p:.3f})."
            )
        return found

    def _notes(self) -> list[str]:
        return [note for note in (self._settings(), self._between(), self._plateaus()) if note]

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

    def _plateaus(self) -> str:
        notes = []
        for row in self.study:
            all_labels, mpl = self.result(row, "all_labels"), self.result(row, "mpl")
            if row.part != "networks" or all_labels is None:
                continue
            parts = [f"the network of all labels after {left_plateau(all_labels)}"]
            if mpl is not None:
                parts.append(f"MPL's student after {left_plateau(mpl)}")
            notes.append(f"- {row.label}: " + ", ".join(parts))
        head = (
            "Steps until the loss on the six labels is below 0.6 nats (knowing nothing is 0.69), median of the draws:"
        )
        return "\n".join([head, "", *notes]) if notes else ""

    def csv(self) -> str:
        """One line per draw, method and row."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["settings", "method", "draw", "accuracy", "teacher_accuracy", "separated", "cosine_labelled",
                         "cosine_true"])  # fmt: skip
        for row in self.study:
            for method in row.methods:
                r = self.results[f"{row.name}/{method}"]
                teacher: Sequence[float | str] = r.teacher_accuracy or [""] * len(self.draws)
                for d, good in enumerate(r.successes(row.settings)):
                    cosines = [round(float(c[-1, d]), 4) for c in (r.cosine_labelled, r.cosine_true)]
                    writer.writerow([row.name, method, self.draws[d], r.accuracy[d], teacher[d], int(good), *cosines])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures; curves are means over draws."""
        return {
            "format": 1,
            "command": self.command,
            "draws": len(self.draws),
            "first_draw": self.draws[0],
            "rows": {
                row.name: {
                    "label": row.label,
                    "settings": row.settings.model_dump(mode="json"),
                    "methods": {m: self._cell_json(row, m) for m in row.methods},
                }
                for row in self.study
            },
            "differences": self._differences(),
        }

    def _cell_json(self, row: Row, method: MethodName) -> dict[str, Any]:
        r = self.results[f"{row.name}/{method}"]
        curves = {
            "accuracy": r.curve, "labelled_loss": r.labelled_loss,
            "cosine_labelled": r.cosine_labelled, "cosine_true": r.cosine_true,
        }  # fmt: skip
        return {
            "separated": sum(r.successes(row.settings)),
            "accuracy": r.accuracy,
            "teacher_accuracy": r.teacher_accuracy,
            "summary": vars(summarise(r.accuracy)),
            "steps": r.steps,
            "mean_curves": {name: np.round(values.mean(axis=1), 5).tolist() for name, values in curves.items()},
        }


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
