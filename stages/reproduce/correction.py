"""`mpl reproduce correction`: what a few labels make of a teacher that is wrong, by a fit, by feedback, by both.

The recipe's teacher is asked once about every image; then only its answers are known. Three teachers come of them: the
answers as they are (of classes of its own: by a map), and two probes fitted to them on other labelled images, one on a
long tail, one on as many of each class, where there is nothing to correct. Each seed draws its own labelled images.

What is asked was fixed before a test image was read: "feedback helps" where its finetuned student beats the fixed
teacher's, the fitted teacher's and NoisyStudent's, paired by draw, after Holm over all these differences.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.correction import Correction, class_map_of, fit_correction, fit_scaling
from pipeline.errors import UsageError
from pipeline.report.experiments.corrections import Corrections, Panel, TeacherRow
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from stages.execution import Stage
from stages.options import Context, changed
from stages.reproduce.black_boxes import BlackBox, ask, labels_of, probe
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.experiment import SeedRuns
from stages.reproduce.methods import POOL, RAW, SCALED, method_changes
from stages.reproduce.variants import Variant, results_of
from stages.teachers import class_names, teacher_of

EMBEDDING = 64  # numbers
TAIL = 50  # images of the most frequent class to one of the rarest
ORACLE = 10  # times the labelled images of a draw, for a fit that shows what there is to gain
FIXED = ("train_reduced.teacher=fixed",)
ALL = ("train_reduced.student_data=pool+labelled", "train_reduced.labelled_target=label")
FEEDBACK = ("train_reduced.teacher=calibrator", *POOL, "train_reduced.calibrator.supervised_weight=0",
            "train_reduced.calibrator.embedding=false", "train_reduced.feedback.weight=1",
            "train_reduced.feedback.control=none")  # fmt: skip
FIT = ("train_reduced.correction=fit",)


def _variant(name: str, label: str, *changes: str) -> Variant:
    return Variant(name, label, "train_reduced", changes, finetuned=True)


OFF = _variant("fixed", "Teacher as it is", *FIXED, *POOL)
NOISY = _variant("noisystudent", "NoisyStudent (pool and labels)", *FIXED, *ALL)
DIRECT = _variant("fit", "Fit to the labels", *FIXED, *POOL, *FIT)
NOISY_FIT = _variant("noisystudent-fit", "NoisyStudent of the fit", *FIXED, *ALL, *FIT)
OURS = _variant("feedback", "Feedback", *FEEDBACK, *RAW)
METHODS = (
    OFF,
    NOISY,
    _variant("scaling", "Scaling to the labels", *FIXED, *POOL, "train_reduced.correction=scaling"),
    DIRECT,
    NOISY_FIT,
    OURS,
    _variant("feedback-fit", "Fit, then feedback", *FEEDBACK, *RAW, *FIT),
    _variant("both", "Feedback and supervised term", *FEEDBACK, *RAW, "train_reduced.calibrator.supervised_weight=1"),
    _variant("per-image", "Feedback, scaled by B/η, with L2", *FEEDBACK, *SCALED),
    _variant("flipped", "Control: feedback flipped", *FEEDBACK, *RAW, "train_reduced.feedback.control=flipped"),
)
PRIOR_EM = _variant("prior-em", "Prior shift by EM", *FIXED, *POOL, "train_reduced.correction=prior-em")
PRIOR_BBSE = _variant("prior-bbse", "Prior shift by BBSE", *FIXED, *POOL, "train_reduced.correction=prior-bbse")
PRIOR = (PRIOR_EM, PRIOR_BBSE)  # of teachers with the data set's classes
SEEING = ("train_reduced.calibrator.embedding=true",)
SUPERVISED_TERM = ("train_reduced.calibrator.supervised_weight=1",)
WITH_EMBEDDING = (
    _variant("feedback-seeing", "Feedback, with embeddings", *FEEDBACK, *RAW, *SEEING),
    _variant("both-seeing", "Feedback and supervised term, with embeddings", *FEEDBACK, *RAW, *SUPERVISED_TERM,
             *SEEING),
    _variant("term-seeing", "Supervised term alone, with embeddings", *FEEDBACK, *RAW, *SUPERVISED_TERM, *SEEING,
             "train_reduced.feedback.weight=0"),
)  # fmt: skip
FEW = (OFF, NOISY, DIRECT, OURS, *PRIOR)  # where there is nothing to correct
SUPERVISED = _variant("supervised", "Supervised, labels alone", "train_reduced.teacher=none")
CONTRASTS = tuple(Contrast(f"Feedback − {other.label}", OURS.name, other.name, tested=True)
                  for other in (OFF, DIRECT, NOISY))  # fmt: skip
FURTHER = (
    *(Contrast(f"Feedback − {other.label}", OURS.name, other.name) for other in PRIOR),
    Contrast("Fit − teacher as it is", DIRECT.name, OFF.name),
    Contrast("Fit, then feedback − fit", "feedback-fit", DIRECT.name),
    Contrast("Feedback − feedback scaled by B/η, with L2", OURS.name, "per-image"),
    Contrast("Feedback − flipped", OURS.name, "flipped"),
    Contrast("NoisyStudent of the fit − fit", NOISY_FIT.name, DIRECT.name),
    Contrast("Feedback, with embeddings − feedback", "feedback-seeing", OURS.name),
    Contrast("Feedback, with embeddings − fit", "feedback-seeing", DIRECT.name),
    Contrast("Both, with embeddings − supervised term alone, with embeddings", "both-seeing", "term-seeing"),
)


@dataclass(frozen=True)
class Cell:
    """One teacher.

    Attributes:
        name: of its runs' folders.
        label: for people.
        methods: students that are trained of it.
        tail: of the images that a probe is fitted to; None: the recipe's teacher itself.
    """

    name: str
    label: str
    methods: tuple[Variant, ...] = METHODS
    tail: float | None = None


CELLS = {
    cell.name: cell
    for cell in (
        Cell("zero-shot", "The teacher itself"),
        Cell("long-tailed", f"Probe on a long tail, {TAIL} : 1", (*METHODS, *WITH_EMBEDDING, *PRIOR), tail=TAIL),
        Cell("clean", "Probe on all classes alike", FEW, tail=1),
    )
}


def plan(runs: SeedRuns, cells: Sequence[str], without_teacher: bool = True, methods: Sequence[str] = ()) -> Stage:
    """Plan the benchmark as one stage.

    Args:
        runs: the draws.
        cells: names of teachers, of `CELLS`; none: all.
        without_teacher: whether UDA and FixMatch run too, where the recipe has a train_mpl section.
        methods: names of the students that are trained of the teachers; none: all.

    Raises:
        UsageError: a method that there is not, no teacher, no draw of labelled images, no validation images for probes.
    """
    context = runs.context
    filtering = context.recipe.filter
    if filtering.teacher is None and not filtering.predictions:
        raise UsageError(
            "correction needs a teacher that was not trained on the labelled images: a recipe with filter.teacher or "
            "filter.predictions, such as --recipe cifar10-correction"
        )
    if context.recipe.data.labelled is None:
        raise UsageError("correction draws labelled images anew for each seed: set data.labelled to their number")
    if context.data_set.manifest.splits["unlabelled"].without:
        raise UsageError(
            f"correction has one pool for all draws, and that of {context.data_set.manifest.name} is what a draw "
            "leaves; choose a data set with a pool of its own"
        )
    chosen = [with_methods(CELLS[name], methods) for name in cells or CELLS]
    if "validation" not in context.data_set.manifest.splits and any(cell.tail for cell in chosen):
        raise UsageError("the probes are fitted to validation images, and there are none; choose --teacher zero-shot")
    alone = tuple(variant.name for variant in _alone(context, without_teacher))
    return runs.stage(
        "correction",
        runs.basis() | {"teacher": teacher_of(context, None, assume_class_order=True).digest,
                        "cells": {cell.name: [method.name for method in cell.methods] for cell in chosen},
                        "without_teacher": list(alone)},
        lambda: work(runs, chosen, without_teacher, methods),
        lambda result: result["answer"],
        cheap=frozenset({"seeds", "cells", "without_teacher"}),
    )  # fmt: skip


def with_methods(cell: Cell, names: Sequence[str]) -> Cell:
    """A teacher with some of its students; without names with all.

    Raises:
        UsageError: none of its students has one of the names.
    """
    if unknown := [name for name in names if name not in {method.name for method in cell.methods}]:
        raise UsageError(
            f"--method {unknown[0]}: the teacher {cell.name} has the students "
            f"{', '.join(method.name for method in cell.methods)}"
        )
    return replace(cell, methods=tuple(m for m in cell.methods if m.name in names)) if names else cell


def _alone(context: Context, without_teacher: bool) -> list[Variant]:
    """Students without a teacher."""
    found = [SUPERVISED]
    if without_teacher and context.recipe.train_mpl is not None:
        for name, title in (("uda", "UDA, no teacher"), ("fixmatch", "FixMatch, no teacher")):
            changes = (*method_changes(context, name), "train_mpl.alone=true")
            found.append(Variant(name, title, "train_mpl", changes, finetuned=True))
    return found


def work(runs: SeedRuns, cells: Sequence[Cell], without_teacher: bool, methods: Sequence[str] = ()) -> dict[str, Any]:
    """Ask the teacher; then a chain for each teacher and draw; then tables and figure."""
    context = runs.context
    everything = _with(context, "data.labelled=null")
    context.console.note("asking the teacher about all images")
    itself = ask(everything, context.run.root)
    boxes = {cell.name: itself if cell.tail is None else probe(everything, itself, cell.tail) for cell in cells}
    alone = _alone(context, without_teacher)
    chains: dict[tuple[str, int], Chain] = {}
    for cell in cells:
        for seed in runs.seeds:
            run = context.run / f"{cell.name}-seed-{seed}"
            chains[cell.name, seed] = Chain(run, seed, tuple(_steps(context, cell, boxes[cell.name], run)))
    for seed in runs.seeds:
        run = context.run / f"alone-seed-{seed}"
        chains["alone", seed] = Chain(run, seed, tuple(step for variant in alone for step in variant.steps(run)))
    records = run_chains(context, chains, runs.jobs)
    results = {
        cell.name: results_of(cell.methods, {seed: records[cell.name, seed] for seed in runs.seeds}) for cell in cells
    }
    reference = results_of(alone, {seed: records["alone", seed] for seed in runs.seeds})
    teachers = {cell.name: teacher_rows(runs, boxes[cell.name]) for cell in cells}
    panels = [
        Panel(cell.name, cell.label, results[cell.name], _present(CONTRASTS, cell), _present(FURTHER, cell),
              teachers[cell.name])
        for cell in cells
    ]  # fmt: skip
    report = Corrections(_about(runs, cells, without_teacher, methods), tuple(panels), reference)
    report.write(context.run.root)
    return {"answer": report.answer()}


def _with(context: Context, *changes: str, seed: int | None = None) -> Context:
    """The same run with changes of the recipe, or another seed."""
    recipe = changed(context.recipe.model_dump(mode="json"), changes, context.recipe.name)
    return replace(context, recipe=recipe, seed=context.seed if seed is None else seed)


def _steps(context: Context, cell: Cell, box: BlackBox, run: Path) -> list[Step]:
    """The pool, whole, with the teacher's answers; then every student."""
    ours = class_names(context)
    own = box.names == ours
    settings = {
        "filter.predictions": json.dumps([box.files]),
        "filter.teacher": "null",
        "filter.predictions_as": "probabilities",
        "filter.predictions_classes": "null",  # the files name their own, and whatever was said is of other files
        "filter.predictions_in_order": "false",
        "filter.seen_labels": "false",
        "filter.correction": "identity" if own else "map",
        "filter.class_map": "null" if own else json.dumps(context.recipe.filter.class_map),
        "filter.k": context.data_set.split("unlabelled").count(),
        "filter.assign": "argmax",
        "filter.min_probability": 0,
        "filter.upsample": "false",
        "filter.copies.enabled": "false",
        "precompute.embedding": "null" if cell.tail is None else EMBEDDING,
    }
    changes = tuple(f"{key}={value}" for key, value in settings.items())
    students = [step for variant in cell.methods for step in variant.steps(run, changes)]
    return [Step("filter", changes), Step("precompute", changes), *students]


def _present(contrasts: Sequence[Contrast], cell: Cell) -> tuple[Contrast, ...]:
    names = {method.name for method in cell.methods}
    kept = [contrast for contrast in contrasts if {contrast.variant, contrast.against} <= names]
    return tuple(replace(contrast, tested=contrast.tested and cell.name != "clean") for contrast in kept)


def teacher_rows(runs: SeedRuns, box: BlackBox) -> list[TeacherRow]:
    """What the teacher's own answers score on the test split: as they are, and corrected on each draw."""
    context = runs.context
    ours = class_names(context)
    places, labels = labels_of(context, "test")
    q = box.of("test", places)
    own = box.names == ours
    path = context.recipe.filter.class_map
    mapped = None if own else class_map_of(None if path is None else Path(path), box.names, ours, complete=True)

    def top1(correction: Correction) -> float:
        return 100 * float((correction.targets(q).argmax(axis=1) == labels).mean())

    start = Correction.identity(ours) if mapped is None else Correction.mapped(box.names, ours, mapped)
    found: dict[str, list[float]] = {"as it is": [top1(start)]}
    few = context.recipe.data.labelled
    assert few is not None
    all_labelled = _with(context, "data.labelled=null").data_set.split("labelled").count()
    for count in (few, ORACLE * few) if ORACLE * few <= all_labelled else (few,):
        for seed in runs.seeds:
            chosen, truth = labels_of(_with(context, f"data.labelled={count}", seed=seed), "labelled")
            answers = box.of("labelled", chosen)
            fitted = fit_correction(answers, truth, box.names, ours, mapped, seed=seed).correction
            found.setdefault(f"fit to {count:,} labels", []).append(top1(fitted))
            if count == few:
                scaled = fit_scaling(answers, truth, box.names, ours, mapped)
                found.setdefault(f"scaling to {count:,} labels", []).append(top1(scaled))
    return [TeacherRow(name, tuple(values)) for name, values in found.items()]


def _about(runs: SeedRuns, cells: Sequence[Cell], without_teacher: bool, methods: Sequence[str]) -> About:
    """Title and notes."""
    context = runs.context
    recipe, settings = context.recipe, context.recipe.train_reduced
    options = [f"--teacher {cell.name}" for cell in cells] if len(cells) < len(CELLS) else []
    options += [f"--method {name}" for name in methods]
    if not without_teacher:
        options.append("--no-rivals")
    teacher = recipe.filter.teacher or ", ".join(recipe.filter.predictions)
    return About(
        stem="correction",
        title=f"{context.data_set.manifest.name}: what {recipe.data.labelled:,} labels make of a teacher that is wrong",
        command=runs.command("correction", *options),
        notes=[
            f"Teacher: {teacher}, asked once; students see its answers alone. Probes are regressions from these "
            "answers to the classes, fitted to validation images: on a long tail, "
            f"{TAIL} of the most frequent class to one of the rarest, or on all. Their embedding of an image is what "
            f"they see of it, reduced to {EMBEDDING} numbers.",
            f"Labels: {recipe.data.labelled:,}, drawn anew by each seed, stratified by class. Pool: "
            f"{context.data_set.split('unlabelled').count():,} images, not filtered, the same for all.",
            f"Students: {settings.model.name} at {recipe.data.image_size} pixels, {settings.steps:,} steps of "
            f"{settings.batch}, from the same initial weights for all methods of a seed; the last step's moving "
            f"average; then {recipe.finetune.steps:,} steps of finetuning on the labels. Feedback every "
            f"{settings.feedback.every} steps. Except NoisyStudent's, students of a teacher see the pool alone until "
            "they are finetuned. Judged once on the test split.",
            _missing({method.name for cell in cells for method in cell.methods}),
        ],
        extra={"settings": settings.model_dump(mode="json")},
    )


def _missing(names: set[str]) -> str:
    """Which rivals from the literature are not in the tables."""
    prior = [title for method, title in ((PRIOR_EM, "EM"), (PRIOR_BBSE, "BBSE")) if method.name not in names]
    left = [f"{' and '.join(prior)} for prior shift"] if prior else []
    return f"Not among the rivals: {', '.join([*left, 'GLC', 'ZeroMatch', 'EMLC'])}, a probe on the teacher's features."
