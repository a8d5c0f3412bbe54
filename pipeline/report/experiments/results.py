"""What the students of an experiment scored, by variant and seed, and the differences that are asked about."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.report.experiments.statistics import PairedDifference, Summary, paired_difference, summarise

FIGURES = ("top1", "top5", "nll", "ece", "seconds", "memory_mib")  # columns of a CSV
FINETUNED_FIGURES = ("top1", "trained_top1", "validation_top1", "top5", "nll", "ece", "seconds", "memory_mib")
Figures = dict[str, float]  # of one student; `trained_top1` is before finetuning


@dataclass(frozen=True)
class Contrast:
    """A difference that an experiment asks about, `variant` − `against`, paired by seed.

    Attributes:
        name: for people.
        variant, against: names of variants.
        tested: whether its p is adjusted for the number of all that are tested (Holm).
    """

    name: str
    variant: str
    against: str
    tested: bool = False


@dataclass(frozen=True)
class Results:
    """Figures of every student.

    Attributes:
        labels: variant → its name for people, in the order of the tables.
        figures: variant → seed → figures; the same seeds for all.
        finetuned: variants whose students were finetuned, and judged before it as well.
    """

    labels: dict[str, str]
    figures: dict[str, dict[int, Figures]]
    finetuned: frozenset[str] = frozenset()

    @property
    def seeds(self) -> list[int]:
        """In the order of all lists below."""
        return list(next(iter(self.figures.values())))

    def by_seed(self, variant: str) -> list[Figures]:
        """Figures of each seed."""
        return [self.figures[variant][seed] for seed in self.seeds]

    def values(self, variant: str, figure: str = "top1") -> list[float]:
        """One figure of each seed."""
        return [figures[figure] for figures in self.by_seed(variant)]

    def summary(self, variant: str, figure: str = "top1") -> Summary:
        """One figure over seeds."""
        return summarise(self.values(variant, figure))

    def difference(self, contrast: Contrast, figure: str = "top1") -> PairedDifference:
        """Of one figure, paired by seed."""
        return paired_difference(self.values(contrast.variant, figure), self.values(contrast.against, figure))

    def lines(self, variant: str, figures: tuple[str, ...], /, **identity: Any) -> Iterator[dict[str, Any]]:
        """Lines of a CSV: what identifies the variant, the seed, the figures."""
        for seed, scores in self.figures[variant].items():
            yield {**identity, "seed": seed, **{figure: scores[figure] for figure in figures}}
