"""Results without a training."""

from pipeline.report.experiments.results import FINETUNED_FIGURES, Results


def results(
    top1: dict[str, list[float]],
    trained: dict[str, list[float]] | None = None,
    labels: dict[str, str] | None = None,
) -> Results:
    """Results with these accuracies by variant, of seeds 0, 1, …; `trained`: before finetuning, of variants that were.

    All other figures are 1.
    """
    before = top1 | (trained or {})
    figures = {
        variant: {
            seed: dict.fromkeys(FINETUNED_FIGURES, 1.0) | {"top1": value, "trained_top1": before[variant][seed]}
            for seed, value in enumerate(values)
        }
        for variant, values in top1.items()
    }
    names = {variant: variant for variant in top1} | (labels or {})
    return Results(names, figures, frozenset(trained or {}))
