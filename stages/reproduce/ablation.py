"""`mpl reproduce ablation`: does the feedback help? Identical runs with it on, off, sign flipped, rows shuffled.

Off is a weight of zero: the student learns from the same kind of targets of a teacher that gets no feedback. The same
runs give figures 9 (training accuracy) and 10 (calibrated distributions) of arXiv:2003.10580v1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.calibration import FILE, Calibration, read_calibration
from pipeline.report.experiments.ablation import Ablation, Group
from pipeline.report.experiments.calibrated import draw_calibrated, mean_changes, sentences
from pipeline.report.experiments.curves import Curve, draw_curves, read_curve
from pipeline.report.experiments.figures import BLUE, ORANGE
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from pipeline.report.experiments.statistics import paired_difference
from pipeline.trainings import mpl_settings
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Records
from stages.reproduce.experiment import UPSTREAM, SeedRuns, what_seeds_change
from stages.reproduce.methods import METHODS, fixed_on_reduced_data, method_changes
from stages.reproduce.variants import Variant, results_of

SEEDS = 10
LOOKS = 20  # at the accuracies, in a training
FEEDBACK = {  # name: (for people, changes of the feedback's section); all else is the same
    "on": ("feedback on", ()),
    "off": ("feedback off", ("weight=0",)),
    "flipped": ("sign flipped", ("control=flipped",)),
    "shuffled": ("rows shuffled", ("control=shuffled",)),
}
TESTED = ("on", "flipped", "shuffled")  # against "off"
ALONE, SUPERVISED = "alone", "alone-supervised"  # trained without a teacher that could have feedback
TEACHER, STUDENT = "teacher, feedback on", "student, feedback on"  # lines of figure 9


@dataclass(frozen=True)
class Choice:
    """What of the ablation is asked for: the kind of feedback, and whether Reduced MPL belongs to it."""

    feedback: str
    reduced: bool

    @property
    def stem(self) -> str:
        """Of the files, and name of the stage."""
        return "ablation" if self.feedback == "soft" else f"ablation-{self.feedback}"

    @property
    def figures(self) -> dict[str, str]:
        """Files of figure 9, and with Reduced MPL of figure 10."""
        return {what: f"{self.stem}-{what}.png" for what in ("training", *["calibration"] * self.reduced)}

    def variants(self, context: Context) -> list[Variant]:
        """All students of one seed."""
        return full_variants(context, self.feedback) + (reduced_variants(context) if self.reduced else [])


def plan(runs: SeedRuns, choice: Choice) -> Stage:
    """Plan the ablation as one stage.

    Raises:
        RecipeError: the recipe has no train_mpl section.
    """
    changes = {variant.name: variant.changes for variant in choice.variants(runs.context)}
    return runs.stage(
        choice.stem,
        runs.basis() | {"variants": changes, "feedback": choice.feedback, "reduced": choice.reduced},
        lambda: work(runs, choice),
        lambda result: " ".join(result["answers"]),
        figures=list(choice.figures.values()),
        cheap=frozenset({"seeds", "variants", "reduced"}),
    )


def full_variants(context: Context, feedback: str) -> list[Variant]:
    """Full MPL, and its method and Supervised alone."""
    settings = mpl_settings(context.recipe)
    looks = f"train_mpl.evaluate_every={max(1, settings.steps // LOOKS)}"
    same = ("train_mpl.alone=false", f"train_mpl.feedback={feedback}", looks)
    alone = ("train_mpl.alone=true", looks)
    chosen = [
        Variant(
            f"mpl-{name}",
            label,
            "train_mpl",
            (*same, *(f"train_mpl.feedback_options.{change}" for change in changes)),
            finetuned=True,
        )
        for name, (label, changes) in FEEDBACK.items()
    ]
    chosen.append(Variant(ALONE, f"{METHODS[settings.method.name]}, alone", "train_mpl", alone))
    if settings.method.name != "supervised":
        supervised = (*method_changes(context, "supervised"), *alone)
        chosen.append(Variant(SUPERVISED, "Supervised, alone", "train_mpl", supervised))
    return chosen


def reduced_variants(context: Context) -> list[Variant]:
    """Reduced MPL, and NoisyStudent on its data. Off: a calibrator that stays as it began."""
    chosen = [
        Variant(
            f"reduced-{name}",
            label,
            "train_reduced",
            ("train_reduced.teacher=calibrator", *(f"train_reduced.feedback.{change}" for change in changes)),
        )
        for name, (label, changes) in FEEDBACK.items()
    ]
    label = "NoisyStudent, the same data"
    return [*chosen, Variant("reduced-fixed", label, "train_reduced", fixed_on_reduced_data(context))]


def work(runs: SeedRuns, choice: Choice) -> dict[str, Any]:
    """Run everything over seeds, then write tables and figures."""
    context = runs.context
    records = runs.train(choice.variants(context), UPSTREAM if choice.reduced else ())
    folders = [runs.folder(seed) for seed in runs.seeds]
    training = training_curves(full_variants(context, choice.feedback), folders)
    draw_curves(training, context.run / choice.figures["training"], "Accuracy during training")
    calibrations = []
    if choice.reduced:
        calibrations = [read_calibration(folder / "student-reduced-on" / FILE) for folder in folders]
        title = "Reduced MPL: what the calibrator makes of pool images"
        draw_calibrated(calibrations, context.run / choice.figures["calibration"], title)
    report = report_of(runs, choice, records, training, calibrations)
    report.write(context.run.root)
    return {"answers": report.answers()}


def report_of(
    runs: SeedRuns,
    choice: Choice,
    records: dict[int, Records],
    training: dict[str, list[Curve]],
    calibrations: list[Calibration],
) -> Ablation:
    """Tables with their sentences, below them figures 9 and 10."""
    context = runs.context
    groups = [_group(f"Full MPL, {choice.feedback} feedback", "mpl", full_variants(context, choice.feedback), records)]
    sections = [
        f"![training and validation accuracy over the steps]({choice.figures['training']})",
        _training(training),
    ]
    extra: dict[str, Any] = {"training": {title: _as_json(curves) for title, curves in training.items()}}
    if choice.reduced:
        groups.append(_group("Reduced MPL", "reduced", reduced_variants(context), records))
        sections += [
            f"![calibrated distributions over the quarters of training]({choice.figures['calibration']})",
            f"Figure 10 of the paper, Reduced MPL with feedback on. {sentences(calibrations)}",
        ]
        extra["calibration"] = mean_changes(calibrations)
    options = ["--feedback hard"] * (choice.feedback == "hard") + ["--no-reduced"] * (not choice.reduced)
    about = About(
        stem=choice.stem,
        title=f"Does the feedback help? Identical runs on {context.recipe.data.manifest}",
        command=runs.command("ablation", *options),
        notes=_notes(context, groups, choice.reduced),
        extra=extra,
    )
    return Ablation(about, tuple(groups), sections)


def _group(title: str, family: str, chosen: list[Variant], records: dict[int, Records]) -> Group:
    """Variants against the one without feedback; only those of the same family are tested."""
    off, tested = f"{family}-off", {f"{family}-{name}" for name in TESTED}
    contrasts = (Contrast(v.label, v.name, off, v.name in tested) for v in chosen if v.name != off)
    return Group(title, results_of(chosen, records), tuple(contrasts))


def training_curves(full: list[Variant], folders: list[Path]) -> dict[str, list[Curve]]:
    """Figure 9: curves by panel; the first line is of Supervised alone."""
    labels = {variant.name: variant.label for variant in full}
    if SUPERVISED in labels:
        alone = [(SUPERVISED, "", labels[SUPERVISED], "black", "-"), (ALONE, "", labels[ALONE], "0.55", "--")]
    else:
        alone = [(ALONE, "", labels[ALONE], "black", "-")]
    lines = (  # student, columns' beginning, name for people, colour, style
        *alone,
        ("mpl-on", "teacher_", TEACHER, BLUE, "-"),
        ("mpl-off", "teacher_", "teacher, feedback off", BLUE, ":"),
        ("mpl-on", "", STUDENT, ORANGE, "-"),
        ("mpl-off", "", "student, feedback off", ORANGE, ":"),
    )

    def curves(split: str) -> list[Curve]:
        return [
            read_curve(
                [folder / f"student-{student}" / "metrics.csv" for folder in folders],
                f"{prefix}{split}_top1",
                name,
                colour,
                style,
            )
            for student, prefix, name, colour, style in lines
        ]

    return {"on the labelled images, not augmented": curves("train"), "on validation": curves("validation")}


def _training(panels: dict[str, list[Curve]]) -> str:
    """Figure 9 in sentences."""
    lines = panels["on the labelled images, not augmented"]
    first = lines[0]
    averages = ", ".join(f"{line.name} {sum(line.averages) / len(line.averages):.2f}" for line in lines)
    below = "; ".join(
        f"{line.name} − {first.name}: {paired_difference(line.averages, first.averages)}"
        for line in lines
        if line.name in (TEACHER, STUDENT)
    )
    return (
        f"Accuracy on the labelled images in % (figure 9 of the paper), the mean over {len(first.steps)} looks during "
        f"training: {averages}. {below}. The figures of the students and of what is trained alone are of their moving "
        f"average, the teachers' of their present weights, so that teacher − {first.name} has that in it as well; p is "
        "not adjusted."
    )


def _as_json(curves: list[Curve]) -> list[dict[str, Any]]:
    return [{"name": c.name, "steps": c.steps.tolist(), "values": c.values.tolist()} for c in curves]


def _notes(context: Context, groups: list[Group], reduced: bool) -> list[str]:
    """What was done, in sentences."""
    settings, own = mpl_settings(context.recipe), context.recipe.train_reduced
    seconds = [s for group in groups for v in group.results.labels for s in group.results.values(v, "seconds")]
    notes = [
        f"Full MPL: student {settings.model.name}, teacher {(settings.teacher.model or settings.model).name} by "
        f"{METHODS[settings.method.name]}, {settings.steps:,} steps on {settings.batch} pool images, "
        f"{settings.labelled_batch} labelled images for the teacher. Variants differ in the feedback alone: the same "
        "initial weights, images, augmentations and kind of targets. Off: weight 0. Alone: the method, or "
        "cross-entropy with labels, trains the network itself, without a student.",
    ]
    if reduced:
        notes.append(
            f"Reduced MPL: student {own.model.name}, {own.steps:,} steps on batches of {own.batch}; not finetuned. "
            f"Off: the calibrator stays at its start, which gives {100 * own.calibrator.floor:.0f}% to the uniform "
            "distribution; NoisyStudent learns from the stored distributions themselves, on the same images."
        )
    return [
        *notes,
        f"Checkpoint, fixed in advance: the last step's moving average; students of full MPL then have "
        f"{context.recipe.finetune.steps:,} steps of finetuning. Split: test. Nothing was chosen on it. "
        f"{what_seeds_change(context)}",
        f"Budget: {len(seconds)} students, {sum(seconds) / 60:.0f} minutes of training in all.",
    ]
