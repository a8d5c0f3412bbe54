"""`mpl reproduce ablation`: does the feedback help? Identical runs with it on, off, sign flipped, rows shuffled.

Off is a weight of zero: the student learns from the same kind of targets of a teacher that gets no feedback. The same
runs give figures 9 (training accuracy) and 10 (calibrated distributions) of arXiv:2003.10580v1.
"""

from pathlib import Path
from typing import Any

from pipeline.calibration import FILE, read_calibration
from pipeline.report.experiments.ablation import Ablation, Group
from pipeline.report.experiments.calibrated import draw_calibrated, mean_changes, sentences
from pipeline.report.experiments.curves import Curve, draw_curves, read_curve
from pipeline.report.experiments.statistics import paired_difference
from pipeline.report.experiments.with_mpl import BLUE, ORANGE
from pipeline.trainings import mpl_settings
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.commands import SEEDS_CHANGE, comparison_basis, seed_run, seeds_text, upstream
from stages.reproduce.parts import Part, Records, finetuned, results, run_parts, trained
from stages.reproduce.table1 import METHODS, changes

SEEDS = 10
LOOKS = 20  # at the accuracies, in a training
FEEDBACK = {  # variant: (setting, value) of the feedback's section; all else is the same
    "feedback on": (),
    "feedback off": ("weight=0",),
    "sign flipped": ("control=flipped",),
    "rows shuffled": ("control=shuffled",),
}
ON, OFF = list(FEEDBACK)[:2]
TESTED = (ON, *list(FEEDBACK)[2:])
SUPERVISED, ALONE, FIXED = "Supervised, alone", "alone", "NoisyStudent, the same data"


def plan(context: Context, seeds: range, jobs: int | None, stem: str, feedback: str, reduced: bool) -> Stage:
    """Plan the ablation as one stage.

    Args:
        context: recipe, data, device, run.
        seeds: all of them.
        jobs: seeds at a time.
        stem: of the files.
        feedback: soft or hard.
        reduced: whether Reduced MPL belongs to it.

    Raises:
        RecipeError: the recipe has no train_mpl section.
    """
    outputs = [context.run / f"{stem}.{suffix}" for suffix in ("md", "csv", "json", "png")]
    outputs.append(context.run / f"{stem}-training.png")
    if reduced:
        outputs.append(context.run / f"{stem}-calibration.png")
    variants = full_variants(context, feedback) | (reduced_variants(context) if reduced else {})
    return Stage(
        name=stem,
        basis=comparison_basis(context, seeds) | {"variants": variants, "feedback": feedback, "reduced": reduced},
        outputs=outputs,
        work=lambda: work(context, seeds, jobs, stem, feedback, reduced),
        summary=lambda result: f"{' '.join(result['answers'])} {outputs[0]}",
        replaces=outputs,
        cheap=frozenset({"seeds", "variants", "reduced"}),
    )


def full_variants(context: Context, feedback: str) -> dict[str, tuple[str, ...]]:
    """Name of a student → changes of the recipe; full MPL, and its method and Supervised alone."""
    settings = mpl_settings(context.recipe)
    looks = f"train_mpl.evaluate_every={max(1, settings.steps // LOOKS)}"
    with_feedback = ("train_mpl.alone=false", f"train_mpl.feedback={feedback}", looks)
    found = {
        f"mpl-{key(variant)}": (*with_feedback, *(f"train_mpl.feedback_options.{text}" for text in texts))
        for variant, texts in FEEDBACK.items()
    }
    alone = ("train_mpl.alone=true", looks)
    if settings.method.name != "supervised":
        found["alone-supervised"] = (*changes(context, "supervised"), *alone)
    return found | {"alone": alone}


def reduced_variants(context: Context) -> dict[str, tuple[str, ...]]:
    """The same for Reduced MPL, and NoisyStudent on its data."""
    from pipeline.batches import mixture

    own = mixture(context.recipe.train_reduced, "calibrator")
    adapts = ("train_reduced.teacher=calibrator",)
    found = {
        f"reduced-{key(variant)}": (*adapts, *(f"train_reduced.feedback.{text}" for text in texts))
        for variant, texts in FEEDBACK.items()
    }
    found["reduced-fixed"] = (
        "train_reduced.teacher=fixed",
        f"train_reduced.student_data={'pool+labelled' if own.labelled else 'pool'}",
        f"train_reduced.labelled_target={'label' if own.true_labels else 'teacher'}",
    )
    return found


def key(variant: str) -> str:
    """Last word, for names of folders."""
    return variant.split()[-1]


def work(
    context: Context, seeds: range, jobs: int | None, stem: str, feedback: str, reduced: bool
) -> dict[str, Any]:  # fmt: skip
    """Run everything over seeds, then write tables and figures."""
    found = run_parts(context, {s: _parts(context, s, feedback, reduced) for s in seeds}, jobs)
    runs = [seed_run(context, seed) for seed in seeds]
    groups = [full_group(context, feedback, found)]
    training, panels = training_section(context, runs, stem)
    sections, extra = [training], {"training": {title: _curves(curves) for title, curves in panels.items()}}
    draw_curves(panels, context.run / f"{stem}-training.png", "Accuracy during training")
    if reduced:
        groups.append(reduced_group(found))
        text, figures = calibration_section(runs, context.run / f"{stem}-calibration.png")
        sections.append(text)
        extra["calibration"] = figures
    ablation = Ablation(
        title=f"Does the feedback help? Identical runs on {context.recipe.data.manifest}",
        seeds=list(seeds),
        groups=tuple(groups),
        sections=sections,
        notes=_notes(context, found, reduced),
        command=_command(context, seeds, feedback, reduced),
        extra=extra,
    )
    ablation.write(context.run.root, stem)
    return {"answers": ablation.answers()}


def _parts(context: Context, seed: int, feedback: str, reduced: bool) -> list[Part]:
    """All students of one seed."""
    run = seed_run(context, seed)
    parts = [
        (trained if name.startswith("alone") else finetuned)("train_mpl", run, name, changed)
        for name, changed in full_variants(context, feedback).items()
    ]
    if reduced:
        parts.append(Part("teacher", tuple(upstream(run))))
        parts += [trained("train_reduced", run, name, of) for name, of in reduced_variants(context).items()]
    return parts


def full_group(context: Context, feedback: str, found: dict[str, list[Records]]) -> Group:
    """Full MPL; the method alone is for comparison, not for the test."""
    of = {variant: results(found[f"mpl-{key(variant)}"]) for variant in FEEDBACK}
    of[method_alone(context)] = results(found["alone"])
    if "alone-supervised" in found:
        of[SUPERVISED] = results(found["alone-supervised"])
    return Group(f"Full MPL, {feedback} feedback", of, OFF, TESTED, tuple(FEEDBACK))


def reduced_group(found: dict[str, list[Records]]) -> Group:
    """Reduced MPL; off is a calibrator that stays as it began."""
    of = {variant: results(found[f"reduced-{key(variant)}"]) for variant in FEEDBACK}
    of[FIXED] = results(found["reduced-fixed"])
    return Group("Reduced MPL", of, OFF, TESTED, ())


def method_alone(context: Context) -> str:
    """The teacher's method by itself, for people."""
    return f"{METHODS[mpl_settings(context.recipe).method.name]}, {ALONE}"


def training_section(context: Context, runs: list[Path], stem: str) -> tuple[str, dict[str, list[Curve]]]:
    """Figure 9: Markdown, and the curves by panel."""
    supervised = mpl_settings(context.recipe).method.name == "supervised"

    def curves(kind: str) -> list[Curve]:
        def of(name: str, column: str, text: str, colour: str, style: str = "-") -> Curve:
            files = [run / f"student-{name}" / "metrics.csv" for run in runs]
            return read_curve(files, f"{column}{kind}_top1", text, colour, style)

        lines = [] if supervised else [of("alone-supervised", "", SUPERVISED, "black")]
        return [
            *lines,
            of("alone", "", method_alone(context), "black" if supervised else "0.55", "-" if supervised else "--"),
            of("mpl-on", "teacher_", "teacher, feedback on", BLUE),
            of("mpl-off", "teacher_", "teacher, feedback off", BLUE, ":"),
            of("mpl-on", "", "student, feedback on", ORANGE),
            of("mpl-off", "", "student, feedback off", ORANGE, ":"),
        ]

    panels = {"on the labelled images, not augmented": curves("train"), "on validation": curves("validation")}
    lines = panels["on the labelled images, not augmented"]
    first = lines[0]
    averages = ", ".join(f"{line.name} {sum(line.averages) / len(line.averages):.2f}" for line in lines)
    below = "; ".join(
        f"{line.name} − {first.name}: {paired_difference(line.averages, first.averages)}"
        for line in lines
        if line.name.endswith("feedback on")
    )
    text = (
        f"![training and validation accuracy over the steps]({stem}-training.png)\n\n"
        f"Accuracy on the labelled images in % (figure 9 of the paper), the mean over {len(first.steps)} looks during "
        f"training: {averages}. {below}. The figures of the students and of what is trained alone are of their moving "
        f"average, the teachers' of their present weights, so that teacher − {first.name} has that in it as well; p is "
        "not adjusted."
    )
    return text, panels


def calibration_section(runs: list[Path], figure: Path) -> tuple[str, dict[str, Any]]:
    """Figure 10: Markdown, and its figures."""
    found = [read_calibration(run / "student-reduced-on" / FILE) for run in runs]
    draw_calibrated(found, figure, "Reduced MPL: what the calibrator makes of pool images")
    text = f"![calibrated distributions over the quarters of training]({figure.name})\n\n"
    return text + f"Figure 10 of the paper, Reduced MPL with feedback on. {sentences(found)}", mean_changes(found)


def _curves(curves: list[Curve]) -> list[dict[str, Any]]:
    return [{"name": c.name, "steps": c.steps.tolist(), "values": c.values.tolist()} for c in curves]


def _notes(context: Context, found: dict[str, list[Records]], reduced: bool) -> list[str]:
    """What was done, in sentences."""
    settings, of = mpl_settings(context.recipe), context.recipe.train_reduced
    everyone = [r for name, records in found.items() if name != "teacher" for r in results(records)]
    seconds = sum(r["seconds"] for r in everyone)
    notes = [
        f"Full MPL: student {settings.model.name}, teacher {(settings.teacher.model or settings.model).name} by "
        f"{METHODS[settings.method.name]}, {settings.steps:,} steps on {settings.batch} pool images, "
        f"{settings.labelled_batch} labelled images for the teacher. Variants differ in the feedback alone: the same "
        "initial weights, images, augmentations and kind of targets. Off: weight 0. Alone: the method, or "
        "cross-entropy with labels, trains the network itself, without a student.",
    ]
    if reduced:
        notes.append(
            f"Reduced MPL: student {of.model.name}, {of.steps:,} steps on batches of {of.batch}; not finetuned. Off: "
            f"the calibrator stays at its start, which gives {100 * of.calibrator.floor:.0f}% to the uniform "
            "distribution; NoisyStudent learns from the stored distributions themselves, on the same images."
        )
    return [
        *notes,
        f"Checkpoint, fixed in advance: the last step's moving average; students of full MPL then have "
        f"{context.recipe.finetune.steps:,} steps of finetuning. Split: test. Nothing was chosen on it. {SEEDS_CHANGE}",
        f"Budget: {len(everyone)} students, {seconds / 60:.0f} minutes of training in all.",
    ]


def _command(context: Context, seeds: range, feedback: str, reduced: bool) -> str:
    text = f"mpl reproduce ablation --recipe {context.recipe.name} {seeds_text(seeds)}"
    text += f" --feedback {feedback}" if feedback != "soft" else ""
    text += "" if reduced else " --no-reduced"
    return text + (" --data DATA" if context.data is not None else "")
