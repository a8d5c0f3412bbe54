"""Markdown of experiments: tables, figures of variants, paired differences, p-values."""

from collections.abc import Sequence

from pipeline.report.experiments.results import Results
from pipeline.report.experiments.statistics import PairedDifference, Summary

DIFFERENCE = ["difference", "95% interval", "p", "p, Holm"]
HEADS = {
    "top1": "top-1, %",
    "trained_top1": "before finetuning",
    "nll": "NLL, nats",
    "ece": "ECE, %",
    "seconds": "training, s",
    "memory_mib": "peak memory, MiB",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its head."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def heads(*figures: str) -> list[str]:
    """Heads of the columns that `figure_cells` fills."""
    return [HEADS[figure] for figure in figures]


def figure_cells(results: Results, variant: str, *figures: str) -> list[str]:
    """Mean ± standard deviation of each figure; of seconds and memory the mean."""
    return [_cell(results, variant, figure) for figure in figures]


def _cell(results: Results, variant: str, figure: str) -> str:
    if figure == "trained_top1" and variant not in results.finetuned:
        return "–"
    summary = results.summary(variant, figure)
    if figure in ("seconds", "memory_mib"):
        return f"{summary.mean:.0f}"
    return decimals(summary, 3) if figure == "nll" else str(summary)


def decimals(summary: Summary, places: int) -> str:
    """With another number of decimals than two."""
    spread = "" if summary.std is None else f" ± {summary.std:.{places}f}"
    return f"{summary.mean:.{places}f}{spread}"


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


def seeds_text(seeds: Sequence[int]) -> str:
    """How many runs, and which."""
    n = len(seeds)
    return f"n = {n} seed{'s' * (n != 1)} ({', '.join(map(str, seeds))})"
