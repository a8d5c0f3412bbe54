"""`mpl reproduce table1`: every method alone, and as the teacher of Meta Pseudo Labels.

Tables 1 of arXiv:2003.10580v1 and 10 of its fourth version. A student with MPL is finetuned on the labelled images,
as in the paper, and judged after it; one that has learned from labelled images all along is not.
"""

from typing import Any

from pipeline.data.manifest import load_manifest
from pipeline.errors import UsageError
from pipeline.report.experiments.pairs import Pairs
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from pipeline.trainings import mpl_settings
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.experiment import SeedRuns, teacher_top1, what_seeds_change
from stages.reproduce.methods import METHODS, NOISY, method_changes, method_settings
from stages.reproduce.variants import Variant, results_of

WITH_MPL = list(METHODS)[:6]
PAPERS = {"cifar10-4k": "CIFAR-10-4K", "svhn-1k": "SVHN-1K", "imagenet-10pct": "ImageNet-10%"}  # by manifest
CONTRASTS = tuple(Contrast(METHODS[name], f"mpl-{name}", f"alone-{name}", tested=True) for name in WITH_MPL)


def variants(context: Context) -> list[Variant]:
    """All students of one seed; the large teacher serves NoisyStudent."""
    chosen = []
    for name, title in METHODS.items():
        changes = method_changes(context, name)
        if name == NOISY:
            chosen.append(Variant(f"alone-{name}", title, "train_reduced", changes))
            continue
        chosen.append(Variant(f"alone-{name}", title, "train_mpl", (*changes, "train_mpl.alone=true")))
        if name in WITH_MPL:
            on_top = (*changes, "train_mpl.alone=false")
            chosen.append(Variant(f"mpl-{name}", f"{title} + MPL", "train_mpl", on_top, finetuned=True))
    return chosen


def plan(runs: SeedRuns) -> Stage:
    """Plan the whole table as one stage.

    Raises:
        UsageError: the recipe has no feedback.
        RecipeError: it has no train_mpl section.
    """
    if mpl_settings(runs.context.recipe).feedback == "none":
        raise UsageError("table1 compares methods with feedback: set train_mpl.feedback to soft or hard")
    methods = {name: method_changes(runs.context, name) for name in METHODS}
    return runs.stage(
        "table1",
        runs.basis() | {"methods": methods},
        lambda: work(runs),
        lambda result: result["answer"],
        cheap=frozenset({"seeds", "methods"}),
    )


def work(runs: SeedRuns) -> dict[str, Any]:
    """Run all methods over seeds, then write the table."""
    chosen = variants(runs.context)
    records = runs.train(chosen)
    report = report_of(runs, results_of(chosen, records), teacher_top1(records.values()))
    report.write(runs.context.run.root)
    return {"answer": report.answer()}


def report_of(runs: SeedRuns, results: Results, teacher: list[float]) -> Pairs:
    """The table with its sentences."""
    context = runs.context
    data_sets = papers_of(context)
    about = About(
        stem="table1",
        title=f"{context.data_set.manifest.name}: methods alone and with Meta Pseudo Labels",
        command=runs.command("table1"),
        notes=[*_notes(context, teacher), _budget(results), *map(_others, data_sets)],
        extra={"teacher_validation_top1": teacher, "settings": mpl_settings(context.recipe).model_dump(mode="json")},
    )
    contrasts = tuple(contrast for contrast in CONTRASTS if contrast.variant in results.labels)
    papers = {
        PAPERS[data_set]: {f"alone-{name}": paper_figure(data_set, name) for name in METHODS} for data_set in data_sets
    }
    return Pairs(about, results, contrasts, papers)


def papers_of(context: Context) -> list[str]:
    """The data set's own figures of the paper, else those of both small data sets."""
    own = context.recipe.data.manifest
    return [own] if own in PAPERS else ["cifar10-4k", "svhn-1k"]


def paper_figure(data_set: str, method: str) -> str:
    """ "alone → with MPL" in the paper, or a dash."""
    figures = ((load_manifest(data_set).paper or {}).get("table1") or {}).get(method)
    return "–" if figures is None else " → ".join(str(figures[key]) for key in ("alone", "mpl") if key in figures)


def _notes(context: Context, teacher: list[float]) -> list[str]:
    """What was done, in sentences."""
    settings, finetune = mpl_settings(context.recipe), context.recipe.finetune
    own = settings.teacher.model or settings.model
    return [
        f"Every student: {settings.model.name}, {settings.steps:,} steps, from the same initial weights for all "
        f"methods of a seed. In a step a method sees {settings.labelled_batch} labelled images and, where it uses the "
        f"pool, {settings.batch} of its images; a student with MPL sees those {settings.batch} alone, and its teacher "
        f"({own.name}, {settings.feedback} feedback) what the method would see alone. NoisyStudent: a fixed "
        f"{context.recipe.pretrain.model.name} ({sum(teacher) / len(teacher):.1f}% on validation), {settings.batch} "
        "images a step, some of them labelled; optimiser, schedule and augmentation are train_reduced's, of the others "
        "train_mpl's.",
        f"Checkpoint, fixed in advance: the last step's moving average; with MPL then {finetune.steps:,} steps of "
        f"finetuning on the labelled images, as in the paper (before it: second table and table1.csv). Split: test. "
        f"Nothing was chosen on it. {what_seeds_change(context)}",
        f"Methods: {'; '.join(_described(context, name) for name in METHODS if name != NOISY)}.",
    ]


def _described(context: Context, name: str) -> str:
    own = {key: value for key, value in method_settings(context, name).items() if key != "name"}
    text = ", ".join(f"{key} {value:g}" for key, value in own.items())
    return f"{METHODS[name]}{f' ({text})' if text else ''}"


def _budget(results: Results) -> str:
    """Seconds of training."""
    seconds = [value for variant in results.labels for value in results.values(variant, "seconds")]
    return f"Budget: {len(seconds)} students, {sum(seconds) / 60:.0f} minutes of training in all."


def _others(data_set: str) -> str:
    """The paper's context rows."""
    paper = load_manifest(data_set).paper or {}
    rows = ", ".join(f"{name} {figure}" for name, figure in (paper.get("others") or {}).items())
    every = f" All labels, supervised: {paper['all_labels']}." if "all_labels" in paper else ""
    network = f" with {paper['network']}" if "network" in paper else ""
    return f"{PAPERS[data_set]}{network} in the paper ({paper['source']}), reported by others: {rows or '–'}.{every}"
