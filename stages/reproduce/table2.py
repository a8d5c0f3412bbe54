"""`mpl reproduce table2`: Supervised, NoisyStudent and Reduced MPL side by side (table 2 of arXiv:2003.10580v1)."""

from dataclasses import replace
from typing import Any

from pipeline.batches import mixture
from pipeline.report.experiments.comparison import Comparison
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Records
from stages.reproduce.experiment import SeedRuns, teacher_top1, what_seeds_change
from stages.reproduce.methods import fixed_on_reduced_data
from stages.reproduce.variants import Variant, results_of

SUPERVISED, NOISY, NOISY_SAME, REDUCED = "supervised", "noisystudent", "noisystudent-same-data", "reduced-mpl"
CONTRASTS = (
    Contrast("Reduced MPL − NoisyStudent", REDUCED, NOISY),
    Contrast("Reduced MPL − NoisyStudent on the same data", REDUCED, NOISY_SAME),
    Contrast("NoisyStudent − Supervised", NOISY, SUPERVISED),
    Contrast("Reduced MPL − Supervised", REDUCED, SUPERVISED),
)


def variants(context: Context) -> list[Variant]:
    """The methods; the second NoisyStudent only where the data differ."""
    settings = context.recipe.train_reduced
    auto = ("train_reduced.student_data=auto", "train_reduced.labelled_target=auto")
    chosen = [
        _variant(SUPERVISED, "Supervised", "train_reduced.teacher=none"),
        _variant(NOISY, "NoisyStudent", "train_reduced.teacher=fixed", *auto),
    ]
    paper = settings.model_copy(update={"student_data": "auto", "labelled_target": "auto"})
    if mixture(settings, "calibrator") != mixture(paper, "fixed"):
        label = "NoisyStudent, on Reduced MPL's data"
        chosen.append(_variant(NOISY_SAME, label, *fixed_on_reduced_data(context)))
    return [*chosen, _variant(REDUCED, "Reduced MPL", "train_reduced.teacher=calibrator")]


def _variant(name: str, label: str, *changes: str) -> Variant:
    return Variant(name, label, "train_reduced", changes, finetuned=True)


def plan(runs: SeedRuns) -> Stage:
    """Plan the whole table as one stage."""
    chosen = variants(runs.context)
    evaluations = [runs.folder(seed) / f"evaluation-{variant.name}.json" for seed in runs.seeds for variant in chosen]
    stage = runs.stage("table2", runs.basis(), lambda: work(runs))
    return replace(stage, outputs=[*stage.outputs, *evaluations])


def work(runs: SeedRuns) -> dict[str, Any]:
    """Run all methods over seeds, then write the table."""
    chosen = variants(runs.context)
    records = runs.train(chosen)
    results = results_of(chosen, records)
    report_of(runs, results, records).write(runs.context.run.root)
    return {"methods": {label: vars(results.summary(variant)) for variant, label in results.labels.items()}}


def report_of(runs: SeedRuns, results: Results, records: dict[int, Records]) -> Comparison:
    """The table with its sentences."""
    context = runs.context
    teacher = teacher_top1(records.values())
    kept = [of_seed["filter"]["result"]["kept"] for of_seed in records.values()]
    about = About(
        stem="table2",
        title=f"Table 2 on {context.data_set.manifest.name}",
        command=runs.command("table2"),
        notes=_notes(context, teacher, kept),
        extra={"teacher_validation_top1": teacher, "kept": kept},
    )
    contrasts = tuple(contrast for contrast in CONTRASTS if contrast.against in results.labels)
    return Comparison(
        about, results, contrasts, {variant: paper_figure(context, variant) for variant in results.labels}
    )


def _notes(context: Context, teacher: list[float], kept: list[int]) -> list[str]:
    """What was done, in sentences."""
    settings, recipe, manifest = context.recipe.train_reduced, context.recipe, context.data_set.manifest
    notes = [
        f"Every student: {settings.model.name}, {settings.steps:,} steps on batches of {settings.batch}, from the same "
        "initial weights for all methods of a seed. Checkpoint: the last step's moving average, fixed in "
        f"advance; then {recipe.finetune.steps:,} steps of finetuning on the labelled images. "
        f"Split: test ({manifest.title}). Nothing was chosen on it. "
        f"{what_seeds_change(context)}",
        f"Teacher: {recipe.pretrain.model.name}, {sum(teacher) / len(teacher):.2f}% on validation; the filter kept "
        f"{min(kept):,} to {max(kept):,} pool images (K = {recipe.filter.k:,}).",
    ]
    source = (manifest.paper or {}).get("source")
    if source:
        notes.append(f"The paper's figures ({source}) come from another scale. What differs here: {recipe.differs}")
    elif recipe.differs:
        notes.append(f"What differs from the paper's table 2: {recipe.differs}")
    return notes


def paper_figure(context: Context, variant: str) -> str:
    """The paper's figure for this data set, from its manifest."""
    paper = context.data_set.manifest.paper or {}
    key = variant.replace("noisystudent", "noisy_student").replace("-", "_")
    value = paper.get(key)
    if value is None:
        return "–"
    deviation = (paper.get("std") or {}).get(key)
    return f"{value}" + (f" ± {deviation}" if deviation is not None else "")
