"""Variants of one method against the same reference, in groups."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.experiments.figures import ORANGE, new_figure, plain, wrapped
from pipeline.report.experiments.markdown import DIFFERENCE, difference_cells, figure_cells, heads, seeds_text, table
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import FINETUNED_FIGURES, Contrast, Results
from pipeline.report.experiments.statistics import PairedDifference, holm_adjusted

WIDE = 25.0  # points: beyond this the figure's scale is linear to 5 points and logarithmic from there
ROW = 14  # differences in a row of panels, at most
TICKS = (-80, -40, -20, -10, -5, -2, 0, 2, 5, 10, 20, 40, 80)  # of such a panel


@dataclass(frozen=True)
class Group:
    """Variants that are alike in all but one thing.

    Attributes:
        title: for people.
        results: of all its variants.
        contrasts: each variant − the reference, named after the variant; the first is what the group is about.
    """

    title: str
    results: Results
    contrasts: tuple[Contrast, ...]

    @property
    def reference(self) -> str:
        """The variant that all others are compared with."""
        return self.contrasts[0].against


@dataclass(frozen=True)
class Ablation(Report):
    """A table for each group; their tested differences are judged together.

    Attributes:
        groups: of variants.
        further: Markdown below the tables: other figures and what they say.
        split: that the students are judged on.
    """

    groups: tuple[Group, ...]
    further: list[str] = field(default_factory=list)
    split: str = "test"

    @property
    def seeds(self) -> list[int]:
        return self.groups[0].results.seeds

    def adjusted(self) -> dict[tuple[str, str], float]:
        """(title of a group, name of a tested contrast) → its p, adjusted for their number."""
        tested: dict[tuple[str, str], PairedDifference] = {
            (group.title, contrast.name): group.results.difference(contrast)
            for group in self.groups
            for contrast in group.contrasts
            if contrast.tested
        }
        return holm_adjusted(tested)

    def answers(self) -> list[str]:
        """A sentence for each group: what its first contrast adds."""
        return [self._answer(group) for group in self.groups]

    def _answer(self, group: Group) -> str:
        first, results = group.contrasts[0], group.results
        text = (
            f"**{group.title}: {first.name} − {results.labels[group.reference]}**: {results.difference(first)} "
            "(points of top-1)."
        )
        if results.finetuned:
            text += f" Before finetuning: {results.difference(first, 'trained_top1')}."
        return text

    def sections(self) -> Iterator[str]:
        yield from self.answers()
        yield self.figure("differences in top-1 by seed")
        adjusted = self.adjusted()
        for group in self.groups:
            yield f"{group.title}:"
            yield _table(group, adjusted)
        yield (
            f"{seeds_text(self.seeds)}; top-1 in %, mean ± standard deviation. Differences from the reference in "
            "points, paired by seed, with the 95% interval of the t-distribution; Holm: p adjusted for all "
            f"{len(adjusted)} tested differences together, **bold** where below 0.05."
        )
        yield from self.further
        yield from self.about.notes

    def lines(self) -> Iterator[dict[str, Any]]:
        for group in self.groups:
            for variant, label in group.results.labels.items():
                yield from group.results.lines(variant, FINETUNED_FIGURES, group=group.title, variant=label)

    def values(self) -> dict[str, Any]:
        adjusted = self.adjusted()
        return {"groups": [_as_json(group, adjusted) for group in self.groups]}

    def draw(self, path: Path) -> None:
        """Differences from the reference: every seed a dot, mean and interval; a panel for each group, below each
        other where a row would be too wide."""
        counts = [len(group.contrasts) for group in self.groups]
        beside = sum(counts) <= ROW
        size = (1.6 + 1.35 * sum(counts), 4.4) if beside else (1.6 + 1.35 * max(counts), 3.6 * len(counts))
        with new_figure(path, figsize=size, layout="constrained") as figure:
            if beside:
                panels = figure.subplots(1, len(counts), width_ratios=counts, squeeze=False)[0]
            else:
                panels = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
            for panel, group in zip(panels, self.groups, strict=True):
                _draw(panel, group)
            for panel in panels[:1] if beside else panels:
                panel.set_ylabel(f"points of top-1 on the {self.split} split")


def _table(group: Group, adjusted: dict[tuple[str, str], float]) -> str:
    results = group.results
    before = ["trained_top1"] if results.finetuned else []
    by_variant = {contrast.variant: contrast for contrast in group.contrasts}
    rows = []
    for variant, label in results.labels.items():
        difference = ["reference", "", "", ""]
        if variant in by_variant:
            contrast = by_variant[variant]
            difference = difference_cells(results.difference(contrast), adjusted.get((group.title, contrast.name)))
        others = figure_cells(results, variant, *before, "nll", "ece", "seconds")
        rows.append([label, *figure_cells(results, variant, "top1"), *difference, *others])
    return table(["", *heads("top1"), *DIFFERENCE, *heads(*before, "nll", "ece", "seconds")], rows)


def _as_json(group: Group, adjusted: dict[tuple[str, str], float]) -> dict[str, Any]:
    results = group.results
    return {
        "title": group.title,
        "reference": results.labels[group.reference],
        "results": {label: results.by_seed(variant) for variant, label in results.labels.items()},
        "differences": {
            contrast.name: vars(results.difference(contrast))
            | {
                "holm": adjusted.get((group.title, contrast.name)),
                "before_finetuning": vars(results.difference(contrast, "trained_top1")),
            }
            for contrast in group.contrasts
        },
    }


def _draw(panel: Any, group: Group) -> None:
    results = group.results
    panel.axhline(0, color="black", linewidth=1, zorder=1)
    for x, contrast in enumerate(group.contrasts):
        d = results.difference(contrast)
        pairs = zip(results.values(contrast.variant), results.values(contrast.against), strict=True)
        differences = [a - b for a, b in pairs]
        panel.scatter([x + 0.14] * len(differences), differences, s=18, color="0.6", linewidth=0, zorder=2)
        colour = ORANGE if contrast.tested else "0.35"
        reach = None if d.low is None or d.high is None else [[d.mean - d.low], [d.high - d.mean]]
        panel.errorbar([x - 0.1], [d.mean], yerr=reach, color=colour, marker="o", markersize=7, capsize=4,
                       elinewidth=2, zorder=3)  # fmt: skip
    if max(map(abs, panel.get_ylim())) > WIDE:  # a control at chance would hide the rest
        panel.set_yscale("symlog", linthresh=5)
        low, high = panel.get_ylim()
        panel.set_yticks([tick for tick in TICKS if 1.3 * low < tick < 1.3 * high])
        panel.set_ylim(min(1.3 * low, -3), max(1.3 * high, 3))
        panel.yaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if tick else "0")
        panel.minorticks_off()
    names = [wrapped(contrast.name, 13) for contrast in group.contrasts]
    panel.set_xticks(range(len(names)), names, fontsize=8.5)
    panel.set_xlim(-0.5, len(names) - 0.5)
    reference = results.labels[group.reference]
    panel.set_title(f"{group.title}\ndifference from “{reference}”", fontsize=10, loc="left")
    plain(panel)
