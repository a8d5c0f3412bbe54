"""`mpl reproduce labels`: methods over the share of the labelled images that they are given.

Figure 7 of arXiv:2003.10580v1: supervised learning, RandAugment, and UDA with Meta Pseudo Labels on 10 to 100% of
ImageNet's labels. Each seed draws its own labelled images, every class in its share (`pipeline.data.draw`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import UsageError
from pipeline.report.experiments.axes import Axis, Level
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from pipeline.report.experiments.sweep import Sweep
from pipeline.trainings import mpl_settings
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Chain, run_chains
from stages.reproduce.experiment import SeedRuns
from stages.reproduce.methods import METHODS, method_changes
from stages.reproduce.variants import Variant, results_of

SHARES = (0.2, 0.4, 0.8, 1.0)
ALONE = ("supervised", "randaugment", "uda")
WITH_MPL = Variant("mpl-uda", "UDA + MPL", "train_mpl", finetuned=True)
CONTRASTS = (
    Contrast("MPL", WITH_MPL.name, "alone-uda", tested=True),
    Contrast("UDA + MPL against labels alone", WITH_MPL.name, "alone-supervised"),
    Contrast("RandAugment against Supervised", "alone-randaugment", "alone-supervised"),
)
ALL = Variant("all", "Supervised, all labels", "train_mpl")


def plan(runs: SeedRuns, shares: Sequence[float]) -> Stage:
    """Plan the study as one stage.

    Raises:
        UsageError: a share is none, or leaves a class without an image; the recipe has no feedback.
        RecipeError: it has no train_mpl section.
    """
    context = runs.context
    if mpl_settings(context.recipe).feedback == "none":
        raise UsageError("labels compares a method with and without feedback: set train_mpl.feedback to soft or hard")
    levels = {share: labels_of(context, share) for share in sorted(set(shares))}
    return runs.stage(
        "labels",
        runs.basis() | {"levels": list(levels.values()), "methods": [variant.name for variant in variants(context)]},
        lambda: work(runs, levels),
        lambda result: f"{result['students']} students;",
        cheap=frozenset({"seeds", "levels"}),
    )


def labels_of(context: Context, share: float) -> int:
    """So many labelled images are a share of those that the recipe has.

    Raises:
        UsageError: it is no share, or fewer than one for each class.
    """
    split = context.data_set.split("labelled")
    count, classes = round(share * split.count()), len(split.class_names)
    if not 0 < share <= 1:
        raise UsageError(f"--share {share:g} must lie in (0, 1]")
    if count < classes:
        raise UsageError(
            f"--share {share:g} of {split.count():,} labelled images are {count:,}, fewer than the {classes:,} "
            f"classes; give at least --share {classes / split.count():.2g}"
        )
    return count


def variants(context: Context) -> list[Variant]:
    """Students of one level and seed."""
    alone = [
        Variant(f"alone-{name}", METHODS[name], "train_mpl", (*method_changes(context, name), "train_mpl.alone=true"))
        for name in ALONE
    ]
    changes = (*method_changes(context, "uda"), "train_mpl.alone=false")
    return [*alone, replace(WITH_MPL, changes=changes)]


def work(runs: SeedRuns, levels: dict[float, int]) -> dict[str, Any]:
    """A chain for each level and seed; then table and figure."""
    context = runs.context
    chosen = variants(context)
    batch = f"train_mpl.labelled_batch={labelled_batch(context, levels)}"
    reference = replace(ALL, changes=(batch, *chosen[0].changes))
    chains: dict[tuple[str, int], Chain] = {}
    for seed in runs.seeds:
        for count in levels.values():
            run = context.run / f"labels-{count}-seed-{seed}"
            changes = (f"data.labelled={count}", batch)
            steps = tuple(step for variant in chosen for step in variant.steps(run, changes))
            chains[point(count), seed] = Chain(run, seed, steps)
        run = context.run / f"all-seed-{seed}"
        chains[ALL.name, seed] = Chain(run, seed, tuple(reference.steps(run)))
    records = run_chains(context, chains, runs.jobs)
    results = {
        point(count): results_of(chosen, {seed: records[point(count), seed] for seed in runs.seeds})
        for count in levels.values()
    }
    all_labels = results_of([reference], {seed: records[ALL.name, seed] for seed in runs.seeds})
    report_of(runs, levels, results, all_labels).write(context.run.root)
    return {"students": len(runs.seeds) * (len(levels) * len(chosen) + 1)}


def labelled_batch(context: Context, levels: dict[float, int]) -> int:
    """Labelled images of a step, the same for all: the recipe's, or as many as the smallest level has."""
    return min(mpl_settings(context.recipe).labelled_batch, *levels.values())


def point(count: int) -> str:
    """Name of a level in the results."""
    return f"labels-{count}"


def report_of(runs: SeedRuns, levels: dict[float, int], results: dict[str, Results], all_labels: Results) -> Sweep:
    """The table with its sentences."""
    context, settings = runs.context, mpl_settings(runs.context.recipe)
    axis = Axis(
        "Labelled images",
        "labels",
        tuple(Level(f"{count:,} ({share:.0%})", point(count)) for share, count in levels.items()),
    )
    about = About(
        stem="labels",
        title=f"{context.data_set.manifest.name}: methods over the number of labelled images",
        command=runs.command("labels", *(f"--share {share:g}" for share in levels)),
        notes=[
            f"Labels: each seed draws its own, stratified by class; of {context.data_set.split('labelled').count():,}. "
            "The pool is the same for all, and does not grow by the images whose labels are left out.",
            f"Students: {settings.model.name}, {settings.steps:,} steps, {settings.batch} pool images and "
            f"{labelled_batch(context, levels)} labelled ones a step, from the same initial weights for all methods "
            f"of a seed; the last step's moving average; with MPL then {context.recipe.finetune.steps:,} steps of "
            "finetuning. "
            "Judged once on the test split; nothing was tuned for any number of labels.",
        ],
        extra={"settings": settings.model_dump(mode="json")},
    )
    return Sweep(about, (axis,), results, CONTRASTS, all_labels)
