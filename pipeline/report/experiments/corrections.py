"""What corrections of a teacher are worth: a table for each teacher, what was asked of it, and one figure."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.figures import BLUE, GREEN, ORANGE, PINK, new_figure, plain, wrapped
from pipeline.report.experiments.markdown import DIFFERENCE, difference_cells, figure_cells, heads, seeds_text, table
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import FINETUNED_FIGURES, Contrast, Results
from pipeline.report.experiments.statistics import holm_adjusted, summarise

SHOWN = ("top1", "trained_top1", "nll", "ece", "seconds")
WIDE = 4.4  # inches, of a panel
GREY = "#777777"


@dataclass(frozen=True)
class TeacherRow:
    """What a teacher's own answers score on the test split: top-1 of each draw, percent; one value without draws."""

    name: str
    top1: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One teacher.

    Attributes:
        name: a word.
        label: for people.
        results: of its students.
        contrasts: what was asked beforehand.
        further: what is shown beside it, without a test.
        teacher: its own accuracy.
    """

    name: str
    label: str
    results: Results
    contrasts: tuple[Contrast, ...]
    further: tuple[Contrast, ...]
    teacher: list[TeacherRow]


@dataclass(frozen=True)
class Corrections(Report):
    """The benchmark.

    Attributes:
        panels: a teacher each.
        reference: students without a teacher.
    """

    panels: tuple[Panel, ...]
    reference: Results

    @property
    def seeds(self) -> list[int]:
        return self.reference.seeds

    def adjusted(self) -> dict[tuple[str, str], float]:
        """Holm's p of all that is tested, by teacher and name of the contrast."""
        tested = {
            (panel.name, contrast.name): panel.results.difference(contrast)
            for panel in self.panels
            for contrast in panel.contrasts
            if contrast.tested
        }
        return holm_adjusted(tested) if tested else {}

    def answer(self) -> str:
        """Where feedback helps, by the rule."""
        adjusted = self.adjusted()
        said = []
        for panel in self.panels:
            tested = [contrast for contrast in panel.contrasts if contrast.tested]
            if not tested:
                continue
            better = [
                contrast
                for contrast in tested
                if adjusted[panel.name, contrast.name] < 0.05 and panel.results.difference(contrast).mean > 0
            ]
            verdict = "helps" if len(better) == len(tested) else "does not help"
            gains = ", ".join(
                f"{panel.results.difference(contrast).mean:+.2f} over {panel.results.labels[contrast.against]}"
                for contrast in tested
            )
            said.append(f"{panel.label}: feedback {verdict} ({gains})")
        return "; ".join(said)

    def sections(self) -> Iterator[str]:
        adjusted = self.adjusted()
        yield f"**{self.answer()}.**" if adjusted else "Nothing was tested."
        yield (
            "The rule, fixed before a test image was read: feedback helps where its finetuned student beats the fixed "
            "teacher's, the fitted teacher's and NoisyStudent's, paired by draw, p < 0.05 after Holm over all "
            f"{len(adjusted)} differences."
        )
        yield f"{seeds_text(self.seeds)}, each a draw of the labelled images; mean ± standard deviation; test split."
        yield self.figure("top-1 after finetuning, by teacher and method")
        for panel in self.panels:
            yield f"## {panel.label}"
            yield table(
                ["the teacher's own answers", heads("top1")[0]],
                [[row.name, str(summarise(row.top1))] for row in panel.teacher],
            )
            yield self._students(panel.results)
            rows = [
                [contrast.name, *difference_cells(panel.results.difference(contrast), adjusted.get(key))]
                for contrast in (*panel.contrasts, *panel.further)
                for key in [(panel.name, contrast.name)]
            ]
            yield table(["after finetuning", *DIFFERENCE], rows)
        yield "## Without a teacher"
        yield self._students(self.reference)
        yield from self.about.notes

    def _students(self, results: Results) -> str:
        rows = [[label, *figure_cells(results, variant, *SHOWN)] for variant, label in results.labels.items()]
        return table(["student", *heads(*SHOWN)], rows)

    def lines(self) -> Iterator[dict[str, Any]]:
        for name, results in [*((panel.name, panel.results) for panel in self.panels), ("none", self.reference)]:
            for variant in results.labels:
                yield from results.lines(variant, FINETUNED_FIGURES, teacher=name, method=variant)

    def values(self) -> dict[str, Any]:
        adjusted = self.adjusted()
        return {
            "teachers": {
                panel.name: {
                    "label": panel.label,
                    "teacher": {row.name: list(row.top1) for row in panel.teacher},
                    "students": {variant: panel.results.by_seed(variant) for variant in panel.results.labels},
                    "differences": {
                        contrast.name: vars(panel.results.difference(contrast))
                        | {"before_finetuning": vars(panel.results.difference(contrast, "trained_top1"))}
                        | ({"p_holm": adjusted[panel.name, contrast.name]} if contrast.tested else {})
                        for contrast in (*panel.contrasts, *panel.further)
                    },
                }
                for panel in self.panels
            },
            "without_teacher": {variant: self.reference.by_seed(variant) for variant in self.reference.labels},
        }

    def draw(self, path: Path) -> None:
        """A panel for each teacher: draws as dots, means as bars, before finetuning pale; lines: without it."""
        height = 2.0 + 0.36 * max(len(panel.results.labels) for panel in self.panels)
        with new_figure(path, dpi=140, figsize=(2.4 + WIDE * len(self.panels), height), layout="constrained") as figure:
            axes = figure.subplots(1, len(self.panels), squeeze=False, sharex=True)[0]
            for axis, panel in zip(axes, self.panels, strict=True):
                self._draw(axis, panel)
            figure.suptitle(self.about.title, fontsize=12, x=0.01, ha="left", fontweight="bold")

    def _draw(self, axis: Any, panel: Panel) -> None:
        labels = panel.results.labels
        for place, (variant, label) in enumerate(labels.items()):
            colour = PINK if "flipped" in label else ORANGE if "eedback" in label else BLUE
            before, after = panel.results.values(variant, "trained_top1"), panel.results.values(variant)
            y = len(labels) - 1 - place
            mean = sum(after) / len(after)
            axis.scatter(before, [y - 0.18] * len(before), s=9, color=colour, alpha=0.3, linewidth=0)
            axis.scatter(after, [y] * len(after), s=20, color=colour, alpha=0.75, linewidth=0, zorder=3)
            axis.vlines(mean, y - 0.3, y + 0.3, color=colour, linewidth=2.6, zorder=4)
            axis.annotate(f"{mean:.1f}", (mean, y + 0.32), ha="center", fontsize=7.5, color=colour)
        for name, style in zip(self.reference.labels, ("-", "--", ":"), strict=False):
            mean = self.reference.summary(name).mean
            axis.axvline(mean, color=GREY, linewidth=1, linestyle=style, zorder=1, label=self.reference.labels[name])
        own = panel.teacher[0]
        axis.axvline(summarise(own.top1).mean, color=GREEN, linewidth=1, zorder=1, label="the teacher's own answers")
        axis.set_yticks(range(len(labels)), [wrapped(label, 30) for label in reversed(labels.values())], fontsize=8)
        axis.set_xlabel("top-1 on the test split, %; pale: before finetuning", fontsize=8)
        axis.set_title(panel.label, fontsize=10.5, loc="left")
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
        plain(axis, "x")
