"""Cells of Markdown tables: means, paired differences, p-values."""

from collections.abc import Sequence

from pipeline.report.experiments.statistics import PairedDifference, Summary

DIFFERENCE = ["difference", "95% interval", "p", "p, Holm"]


def row(cells: Sequence[str]) -> str:
    """One row."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its head."""
    return "\n".join([row(head), row(["---"] * len(head)), *(row(cells) for cells in rows)])


def difference_cells(difference: PairedDifference, adjusted: float | None) -> list[str]:
    """Mean, interval, p, p adjusted; the mean bold where the adjusted p is below 0.05."""
    mean = f"{difference.mean:+.2f}"
    if adjusted is not None and adjusted < 0.05:
        mean = f"**{mean}**"
    if difference.low is None or difference.high is None:
        return [mean, "–", "–", "–"]
    interval = f"[{difference.low:+.2f}, {difference.high:+.2f}]"
    return [mean, interval, p_text(difference.p), p_text(adjusted)]


def p_text(p: float | None) -> str:
    """p with three decimals."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def small(summary: Summary) -> str:
    """With three decimals, for nats."""
    return f"{summary.mean:.3f}" + ("" if summary.std is None else f" ± {summary.std:.3f}")


def of_seeds(seeds: Sequence[int]) -> str:
    """How many runs, and which."""
    n = len(seeds)
    return f"n = {n} seed{'s' * (n != 1)} ({', '.join(map(str, seeds))})"
