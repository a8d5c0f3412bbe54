"""`mpl reproduce swapped-teacher`: does the feedback act?

The teacher's distributions have two pairs of classes swapped. A student of the fixed teacher learns the swap;
feedback alone must undo it. With its sign flipped, or its rows shuffled over the batch, it must not.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network
from pipeline.report.experiments.comparison import Comparison
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from pipeline.report.experiments.statistics import summarise
from stages.execution import Stage
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.experiment import SeedRuns, what_seeds_change
from stages.reproduce.variants import Variant, results_of

PAIRS = ((0, 1), (2, 3))
SAME_DATA = ("train_reduced.student_data=pool", "train_reduced.feedback.held_out=0")
ALONE = ("train_reduced.teacher=calibrator", "train_reduced.calibrator.supervised_weight=0", *SAME_DATA)


def _variant(name: str, label: str, *changes: str) -> Variant:
    return Variant(name, label, "train_reduced", changes, finetuned=True)


FIXED = _variant("fixed", "Swapped teacher, fixed", "train_reduced.teacher=fixed", *SAME_DATA)
FEEDBACK = _variant("feedback", "Swapped teacher, feedback alone", *ALONE)
VARIANTS = (  # all with the swapped teacher and on the pool alone
    FIXED,
    FEEDBACK,
    _variant("flipped", "Control: sign flipped", *ALONE, "train_reduced.feedback.control=flipped"),
    _variant("shuffled", "Control: rows shuffled", *ALONE, "train_reduced.feedback.control=shuffled"),
    _variant(
        "supervised-term",
        "Supervised term alone",
        *ALONE,
        "train_reduced.calibrator.supervised_weight=1",
        "train_reduced.feedback.weight=0",
    ),
    _variant("both", "Feedback and supervised term", *ALONE, "train_reduced.calibrator.supervised_weight=1"),
)
UNSWAPPED = "unswapped"
CONTRASTS = (Contrast("Feedback alone − fixed", FEEDBACK.name, FIXED.name),)


def plan(runs: SeedRuns) -> Stage:
    """Plan the experiment as one stage."""
    return runs.stage(
        "swapped-teacher",
        runs.basis(),
        lambda: work(runs),
        lambda result: f"won back: {_percent(result['won_back'][FEEDBACK.name])};",
    )


def work(runs: SeedRuns) -> dict[str, Any]:
    """The fixed teacher as it is, then all variants with the swapped one; then the table."""
    unswapped = results_of([FIXED], runs.train([FIXED]))
    chains = {seed: _chain(runs.folder(seed), seed) for seed in runs.seeds}
    swapped = results_of(VARIANTS, run_chains(runs.context, chains, runs.jobs))
    results = Results(
        {UNSWAPPED: "Unswapped teacher, fixed"} | swapped.labels,
        {UNSWAPPED: unswapped.figures[FIXED.name]} | swapped.figures,
        swapped.finetuned | {UNSWAPPED},
    )
    fractions = won_back(results)
    report_of(runs, results, fractions).write(runs.context.run.root)
    return {"won_back": {name: values["of_means"] for name, values in fractions.items()}}


def _chain(source: Path, seed: int) -> Chain:
    """The stages with a teacher whose outputs are swapped, in a run of their own."""
    teacher = source / "teacher-swapped"
    write_swapped(source / "teacher", teacher)
    run = source.with_name(f"{source.name}-swapped")
    students = [step for variant in VARIANTS for step in variant.steps(run)]
    return Chain(run, seed, (Step("filter", arguments={"teacher": teacher}), Step("precompute"), *students))


def write_swapped(source: Path, folder: Path) -> None:
    """Save a copy of a network whose outputs of `PAIRS` are exchanged."""
    network = load_network(source)
    linear = last_linear(network)
    order = torch.arange(linear.out_features)
    for a, b in PAIRS:
        order[[a, b]] = order[[b, a]]
    with torch.no_grad():
        linear.weight.copy_(linear.weight[order].clone())
        linear.bias.copy_(linear.bias[order].clone())
    save_network(folder, network, network.model.state_dict())


def last_linear(network: Network) -> torch.nn.Linear:
    """The layer that gives the logits."""
    classes = len(network.class_names)
    return [m for m in network.model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == classes][-1]


def won_back(results: Results) -> dict[str, dict[str, Any]]:
    """(variant − fixed) / (unswapped − fixed) in top-1 before finetuning.

    Of the means, and per seed; None: nothing was lost.
    """
    before = "trained_top1"
    unswapped, fixed = results.values(UNSWAPPED, before), results.values(FIXED.name, before)
    fractions = {}
    for variant in results.labels:
        if variant in (UNSWAPPED, FIXED.name):
            continue
        values = results.values(variant, before)
        each = [_fraction(v - f, u - f) for v, f, u in zip(values, fixed, unswapped, strict=True)]
        of_means = _fraction(sum(values) - sum(fixed), sum(unswapped) - sum(fixed))
        fractions[variant] = {"of_means": of_means, "per_seed": each}
    return fractions


def _fraction(gain: float, cost: float) -> float | None:
    return gain / cost if cost else None


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f}%"


def report_of(runs: SeedRuns, results: Results, fractions: dict[str, dict[str, Any]]) -> Comparison:
    """The table with its sentences."""
    settings = runs.context.recipe.train_reduced
    lines = [
        "Won back of what the swap costs, (variant − fixed) / (unswapped − fixed) before finetuning, of the means; "
        "± over seeds:",
        "",
    ]
    for variant, values in fractions.items():
        each = [100 * value for value in values["per_seed"] if value is not None]
        spread = f" ± {summarise(each).std:.0f}" if len(each) > 1 else ""
        lines.append(f"- {results.labels[variant]}: **{_percent(values['of_means'])}**{spread}")
    classes = " and ".join(f"{a}↔{b}" for a, b in PAIRS)
    about = About(
        stem="swapped-teacher",
        title="Does the feedback act? A teacher with two pairs of classes swapped",
        command=runs.command("swapped-teacher"),
        notes=[
            "\n".join(lines),
            f"Classes {classes} are exchanged in the teacher's outputs, on pool and labelled images. All students: "
            f"{settings.model.name}, {settings.steps:,} steps on batches of "
            f"{settings.batch} pool images, never a labelled image; the last step's moving average. What is "
            "won back is judged there; after it come "
            f"{runs.context.recipe.finetune.steps:,} steps of finetuning on the labelled images, which see no teacher. "
            f"Split: test. {what_seeds_change(runs.context)}",
        ],
        extra={"won_back": fractions},
    )
    return Comparison(about, results, CONTRASTS)
