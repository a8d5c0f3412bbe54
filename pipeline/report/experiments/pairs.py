"""Methods alone and as the teacher of Meta Pseudo Labels: tables 1 of arXiv:2003.10580v1 and 10 of v4."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.figures import BLUE, ORANGE, dots, new_figure, plain
from pipeline.report.experiments.markdown import DIFFERENCE, difference_cells, figure_cells, heads, seeds_text, table
from pipeline.report.experiments.report import Report
from pipeline.report.experiments.results import FINETUNED_FIGURES, Contrast, Results
from pipeline.report.experiments.statistics import PairedDifference, holm_adjusted

DETAILS = ("trained_top1", "top1", "nll", "ece", "seconds", "memory_mib")  # columns of the second table


@dataclass(frozen=True)
class Pairs(Report):
    """A row for each method.

    Attributes:
        results: variants in pairs; a method without MPL has one.
        contrasts: with MPL − alone, named after the method, all tested.
        papers: data set of a column → variant alone → the paper's figures.
    """

    results: Results
    contrasts: tuple[Contrast, ...]
    papers: dict[str, dict[str, str]]

    @property
    def seeds(self) -> list[int]:
        return self.results.seeds

    @property
    def methods(self) -> dict[str, Contrast | None]:
        """Variant alone → with MPL on top of it, if there is one."""
        with_mpl = {contrast.against: contrast for contrast in self.contrasts}
        on_top = {contrast.variant for contrast in self.contrasts}
        return {variant: with_mpl.get(variant) for variant in self.results.labels if variant not in on_top}

    def differences(self, figure: str = "top1") -> dict[str, tuple[PairedDifference, float]]:
        """Name of a contrast → difference, and its p adjusted for their number."""
        differences = {contrast.name: self.results.difference(contrast, figure) for contrast in self.contrasts}
        adjusted = holm_adjusted(differences)
        return {name: (difference, adjusted[name]) for name, difference in differences.items()}

    def answer(self) -> str:
        """What the differences say, in two sentences."""
        return (
            f"With MPL on top and finetuned, {self._kinds('top1')}. "
            f"Before finetuning, at equal steps, {self._kinds('trained_top1')}."
        )

    def _kinds(self, figure: str) -> str:
        kinds: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for name, (difference, adjusted) in self.differences(figure).items():
            kind = "undecided" if adjusted >= 0.05 else "better" if difference.mean > 0 else "worse"
            kinds[kind].append(f"{name} ({difference.mean:+.2f})")
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)

    def sections(self) -> Iterator[str]:
        yield self.answer()
        yield self._main()
        yield (
            f"{seeds_text(self.seeds)}; top-1 in %, mean ± standard deviation. Difference: X + MPL − X in points, "
            "paired by seed, with the 95% interval of the t-distribution; Holm: p adjusted for all "
            f"{len(self.contrasts)} differences together, **bold** where below 0.05. Before finetuning: the same "
            "difference, at equal steps, its p adjusted likewise."
        )
        yield self.figure("top-1 alone and with MPL, by seed")
        rows = [
            [label, *figure_cells(self.results, variant, *DETAILS)] for variant, label in self.results.labels.items()
        ]
        yield table(["student", *heads(*DETAILS)], rows)
        yield from self.about.notes

    def _main(self) -> str:
        head = ["", "alone", "with MPL", *DIFFERENCE, "before finetuning", *(f"paper, {name}" for name in self.papers)]
        after, before, rows = self.differences(), self.differences("trained_top1"), []
        for alone, contrast in self.methods.items():
            cells = [self.results.labels[alone], *figure_cells(self.results, alone, "top1")]
            if contrast is None:
                cells += ["–"] * 6
            else:
                cells += [
                    *figure_cells(self.results, contrast.variant, "top1"),
                    *difference_cells(*after[contrast.name]),
                ]
                mean, interval, _, p = difference_cells(*before[contrast.name])
                cells.append(mean if interval == "–" else f"{mean} {interval}, p {p}")
            rows.append([*cells, *(figures[alone] for figures in self.papers.values())])
        return table(head, rows)

    def lines(self) -> Iterator[dict[str, Any]]:
        for alone, contrast in self.methods.items():
            label = self.results.labels[alone]
            yield from self.results.lines(alone, FINETUNED_FIGURES, method=label, mpl="no")
            if contrast is not None:
                yield from self.results.lines(contrast.variant, FINETUNED_FIGURES, method=label, mpl="yes")

    def values(self) -> dict[str, Any]:
        after, before, methods = self.differences(), self.differences("trained_top1"), {}
        for alone, contrast in self.methods.items():
            entry: dict[str, Any] = {
                "alone": self.results.by_seed(alone),
                "paper": {name: figures[alone] for name, figures in self.papers.items()},
            }
            if contrast is not None:
                entry["mpl"] = self.results.by_seed(contrast.variant)
                for key, differences in (("difference", after), ("difference_before_finetuning", before)):
                    difference, adjusted = differences[contrast.name]
                    entry[key] = vars(difference) | {"holm": adjusted}
            methods[self.results.labels[alone]] = entry
        return {"methods": methods}

    def draw(self, path: Path) -> None:
        """Every seed a dot, alone and with MPL side by side and joined; means as bars."""
        methods, tops = self.methods, self.results.values
        with new_figure(path, figsize=(1.8 + 1.15 * len(methods), 4.6), layout="constrained") as figure:
            panel = figure.subplots()
            for x, (alone, contrast) in enumerate(methods.items()):
                left, right = (x, x) if contrast is None else (x - 0.16, x + 0.16)
                dots(panel, left, tops(alone), BLUE, bar=BLUE, width=0.13)
                if contrast is not None:
                    pairs = [tops(alone), tops(contrast.variant)]
                    panel.plot([left, right], pairs, color="0.8", linewidth=0.8, zorder=1)
                    dots(panel, right, tops(contrast.variant), ORANGE, bar=ORANGE, width=0.13)
            panel.scatter([], [], color=BLUE, label="alone")
            panel.scatter([], [], color=ORANGE, label="with MPL on top")
            panel.legend(
                frameon=False, fontsize=9, loc="lower right", ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0.2
            )
            names = [self.results.labels[alone].replace(" ", "\n") for alone in methods]
            panel.set_xticks(range(len(names)), names, fontsize=8.5)
            panel.set_ylabel("top-1 on the test split, %")
            panel.set_title(self.about.title, fontsize=11, loc="left")
            plain(panel)
