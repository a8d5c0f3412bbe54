"""Methods side by side, and their differences: table 2, the swapped teacher."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.experiments.figures import BLUE, ORANGE, dots, new_figure, plain, wrapped
from pipeline.report.experiments.markdown import figure_cells, heads, seeds_text, table
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import FIGURES, FINETUNED_FIGURES, Contrast, Results

SHOWN = ("nll", "ece", "seconds", "memory_mib")  # columns of the table, after the accuracies


@dataclass(frozen=True)
class Comparison(Report):
    """A row for each variant.

    Attributes:
        results: of all variants.
        contrasts: a sentence each.
        paper: variant → the paper's figure; {}: it has none.
    """

    results: Results
    contrasts: tuple[Contrast, ...]
    paper: dict[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return self.results.seeds

    def sections(self) -> Iterator[str]:
        shown = ("top1", *["trained_top1"] * bool(self.results.finetuned), *SHOWN)
        rows = [
            [label, *figure_cells(self.results, variant, *shown), *([self.paper[variant]] if self.paper else [])]
            for variant, label in self.results.labels.items()
        ]
        yield table(["", *heads(*shown), *(["paper"] if self.paper else [])], rows)
        yield f"{seeds_text(self.seeds)}; mean ± standard deviation."
        for contrast in self.contrasts:
            yield self._difference(contrast)
        yield from self.about.notes
        yield self.figure("top-1 by method and seed")

    def _difference(self, contrast: Contrast) -> str:
        text = f"**{contrast.name}**: {self.results.difference(contrast)} (points of top-1)."
        if {contrast.variant, contrast.against} <= self.results.finetuned:
            text += f" Before finetuning: {self.results.difference(contrast, 'trained_top1')}."
        return text

    def lines(self) -> Iterator[dict[str, Any]]:
        figures = FINETUNED_FIGURES if self.results.finetuned else FIGURES
        for variant, label in self.results.labels.items():
            yield from self.results.lines(variant, figures, method=label)

    def values(self) -> dict[str, Any]:
        results = self.results
        return {
            "methods": {
                label: {
                    "top1": vars(results.summary(variant)),
                    "paper": self.paper.get(variant, ""),
                    "results": results.by_seed(variant),
                }
                for variant, label in results.labels.items()
            },
            "differences": {
                contrast.name: vars(results.difference(contrast))
                | {"before_finetuning": vars(results.difference(contrast, "trained_top1"))}
                for contrast in self.contrasts
            },
        }

    def draw(self, path: Path) -> None:
        """Every seed a dot, the mean a bar, seeds joined by thin lines."""
        tops = [self.results.values(variant) for variant in self.results.labels]
        with new_figure(path, dpi=130, figsize=(1.6 + 1.5 * len(tops), 4.2), layout="constrained") as figure:
            panel = figure.subplots()
            panel.plot(range(len(tops)), tops, color="0.8", linewidth=0.8, zorder=1)
            for x, values in enumerate(tops):
                dots(panel, x, values, BLUE, bar=ORANGE, width=0.28)
            names = [wrapped(label, 18) for label in self.results.labels.values()]
            panel.set_xticks(range(len(tops)), names, fontsize=8)
            panel.set_ylabel("top-1, %")
            panel.set_title(self.about.title, fontsize=10)
            panel.margins(x=0.12, y=0.12)
            plain(panel)
