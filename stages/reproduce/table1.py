"""`mpl reproduce table1`: every method alone, and as the teacher of Meta Pseudo Labels.

Tables 1 of arXiv:2003.10580v1 and 10 of its fourth version. A student with MPL is finetuned on the labelled images,
as in the paper, and judged after it; one that has learned from labelled images all along is not.
"""

import json
from typing import Any

from pipeline.config import TrainMplSettings
from pipeline.data.manifest import load_manifest
from pipeline.errors import UsageError
from pipeline.methods import parse_method
from pipeline.report.experiments.with_mpl import Row, WithMpl
from pipeline.trainings import mpl_settings
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.commands import SEEDS_CHANGE, comparison_basis, seed_run, seeds_text, upstream
from stages.reproduce.parts import Part, Records, finetuned, results, run_parts, trained

NOISY = "noisystudent"
METHODS = {  # name: for people
    "supervised": "Supervised",
    "label_smoothing": "Label smoothing",
    "randaugment": "RandAugment",
    "mixup": "Mixup",
    "pseudo_labels": "Pseudo Labels",
    "uda": "UDA",
    "fixmatch": "FixMatch",
    NOISY: "NoisyStudent",
}
WITH_MPL = list(METHODS)[:6]
PAPERS = {"cifar10-4k": "CIFAR-10-4K", "svhn-1k": "SVHN-1K", "imagenet-10pct": "ImageNet-10%"}  # by manifest


def plan(context: Context, seeds: range, jobs: int | None) -> Stage:
    """Plan the whole table as one stage.

    Raises:
        UsageError: the recipe has no feedback.
        RecipeError: it has no train_mpl section.
    """
    settings = mpl_settings(context.recipe)
    if settings.feedback == "none":
        raise UsageError("table1 compares methods with feedback: set train_mpl.feedback to soft or hard")
    outputs = [context.run / f"table1.{suffix}" for suffix in ("md", "csv", "json", "png")]
    return Stage(
        name="table1",
        basis=comparison_basis(context, seeds) | {"methods": {name: changes(context, name) for name in METHODS}},
        outputs=outputs,
        work=lambda: work(context, seeds, jobs),
        summary=lambda result: f"{result['answer']} {outputs[0]}",
        replaces=outputs,
        cheap=frozenset({"seeds", "methods"}),
    )


def work(context: Context, seeds: range, jobs: int | None) -> dict[str, Any]:
    """Run all methods over seeds, then write the table."""
    found = run_parts(context, {seed: parts_of(context, seed) for seed in seeds}, jobs)
    rows = [
        Row(
            title,
            results(found[f"alone-{name}"]),
            results(found[f"mpl-{name}"]) if name in WITH_MPL else None,
            tuple(paper_figure(data_set, name) for data_set in papers_of(context)),
        )
        for name, title in METHODS.items()
    ]
    table = table_of(context, seeds, rows, found["teacher"])
    table.write(context.run.root, "table1")
    return {"answer": table.answer()}


def parts_of(context: Context, seed: int) -> list[Part]:
    """All students of one seed; the large teacher serves NoisyStudent."""
    run = seed_run(context, seed)
    parts = [Part("teacher", tuple(upstream(run)))]
    for name in METHODS:
        stage = "train_reduced" if name == NOISY else "train_mpl"
        parts.append(trained(stage, run, f"alone-{name}", (*changes(context, name), *_alone(name, True))))
        if name in WITH_MPL:
            parts.append(finetuned(stage, run, f"mpl-{name}", (*changes(context, name), *_alone(name, False))))
    return parts


def _alone(name: str, alone: bool) -> tuple[str, ...]:
    return () if name == NOISY else (f"train_mpl.alone={str(alone).lower()}",)


def changes(context: Context, name: str) -> tuple[str, ...]:
    """Changes of the recipe that make a method: its settings, and the same network, steps and batch for all."""
    settings = mpl_settings(context.recipe)
    if name == NOISY:
        model = json.dumps(settings.model.model_dump(mode="json"))
        return (
            "train_reduced.teacher=fixed",
            f"train_reduced.model={model}",
            f"train_reduced.steps={settings.steps}",
            f"train_reduced.batch={settings.batch}",
        )
    method = json.dumps(method_settings(context, name))
    # What sets these two apart is the smoothing; the recipe's own, a part of all others, would make them one.
    smoothing = ("train_mpl.label_smoothing=0",) if name in ("supervised", "label_smoothing") else ()
    return (f"train_mpl.method={method}", *smoothing)


def method_settings(context: Context, name: str) -> dict[str, Any]:
    """The recipe's settings of a method: train_mpl.method, reproduce.methods, else the method's defaults."""
    known = [mpl_settings(context.recipe).method, *context.recipe.reproduce.methods]
    method = next((method for method in known if method.name == name), None) or parse_method(name)
    return method.model_dump(mode="json")


def papers_of(context: Context) -> list[str]:
    """The data set's own figures of the paper, else those of both small data sets."""
    own = context.recipe.data.manifest
    return [own] if own in PAPERS else ["cifar10-4k", "svhn-1k"]


def paper_figure(data_set: str, method: str) -> str:
    """ "alone → with MPL" in the paper, or a dash."""
    found = ((load_manifest(data_set).paper or {}).get("table1") or {}).get(method)
    return "–" if found is None else " → ".join(str(found[key]) for key in ("alone", "mpl") if key in found)


def table_of(context: Context, seeds: range, rows: list[Row], teachers: list[Records]) -> WithMpl:
    """The table with its sentences."""
    from stages.learning import manifest_of

    recipe, settings = context.recipe, mpl_settings(context.recipe)
    command = f"mpl reproduce table1 --recipe {recipe.name} {seeds_text(seeds)}"
    if context.data is not None:
        command += " --data DATA"
    papers = papers_of(context)
    teacher = [records[0]["result"]["validation"]["top1"] for records in teachers]
    return WithMpl(
        title=f"{manifest_of(context).name}: methods alone and with Meta Pseudo Labels",
        seeds=list(seeds),
        rows=rows,
        papers=tuple(PAPERS[name] for name in papers),
        notes=[*_notes(context, settings, teacher), _budget(rows), *map(_others, papers)],
        command=command,
        extra={"teacher_validation_top1": teacher, "settings": settings.model_dump(mode="json")},
    )


def _notes(context: Context, settings: TrainMplSettings, teacher: list[float]) -> list[str]:
    """What was done, in sentences."""
    finetune = context.recipe.finetune
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
        f"Nothing was chosen on it. {SEEDS_CHANGE}",
        f"Methods: {'; '.join(_described(context, name) for name in METHODS if name != NOISY)}.",
    ]


def _described(context: Context, name: str) -> str:
    own = {key: value for key, value in method_settings(context, name).items() if key != "name"}
    text = ", ".join(f"{key} {value:g}" for key, value in own.items())
    return f"{METHODS[name]}{f' ({text})' if text else ''}"


def _budget(rows: list[Row]) -> str:
    """Seconds of training."""
    seconds = [r["seconds"] for row in rows for r in (*row.alone, *(row.mpl or []))]
    return f"Budget: {len(seconds)} students, {sum(seconds) / 60:.0f} minutes of training in all."


def _others(data_set: str) -> str:
    """The paper's context rows."""
    paper = load_manifest(data_set).paper or {}
    rows = ", ".join(f"{name} {figure}" for name, figure in (paper.get("others") or {}).items())
    every = f" All labels, supervised: {paper['all_labels']}." if "all_labels" in paper else ""
    network = f" with {paper['network']}" if "network" in paper else ""
    return f"{PAPERS[data_set]}{network} in the paper ({paper['source']}), reported by others: {rows or '–'}.{every}"
