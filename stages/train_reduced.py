"""`mpl train-reduced`: targets + labelled images → student/, with the calibrator, or with a baseline's teacher."""

from typing import Any

import click

from pipeline.assembly import Output
from pipeline.config import Reading
from pipeline.trainings import CALIBRATOR, pool_reading, train_reduced
from stages.basis import network_outputs, require_engine, training_basis, training_stage
from stages.console import on_validation
from stages.execution import Stage, execute
from stages.options import Context, stage_options, with_changes
from stages.precompute import open_targets, require_fresh_targets
from stages.students import NAME_HELP, name_option, own_student, stage_name, student_folder
from stages.teachers import require_evidence, teacher_of

IRRELEVANT = {  # settings that change nothing, by teacher
    "none": {"calibrator", "feedback", "student_data", "labelled_target", "labelled_share"},
    "fixed": {"calibrator", "feedback"},
    "calibrator": set[str](),
}


@click.command()
@stage_options
@click.option("--teacher", type=click.Choice(["calibrator", "fixed", "none"]),
              help="calibrator: Reduced MPL. fixed: NoisyStudent. none: Supervised.")  # fmt: skip
@name_option(NAME_HELP)
def command(context: Context, teacher: str | None, name: str | None) -> None:
    """Train the student.

    Reads: targets/ and the labelled split. Writes: student/model.safetensors, config.json, metrics.csv,
    calibrator.safetensors, calibration.json.
    """
    context = with_changes(context, train_reduced__teacher=teacher)
    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> Stage:
    """Plan the stage."""
    settings = context.recipe.train_reduced
    if settings.teacher == "calibrator":
        require_engine(context, settings.model, settings.feedback)
    folder = student_folder(context, name)
    labelled = context.data_set.split("labelled")
    inputs: dict[str, Any] = {"labelled": labelled.fingerprint()}
    if settings.teacher != "none":
        precomputed = require_fresh_targets(context.run)["result"]
        filtered = (context.run.record("filter") or {}).get("result")
        if settings.correction not in ("auto", "identity", "map"):
            require_evidence(teacher_of(context, None, recorded=filtered))
        if settings.teacher == "calibrator" and (filtered or {}).get("correction") is not None:
            inputs["perceptron"] = "log-ratios"  # it saw the distribution as it stands once
        inputs["targets"] = precomputed["fingerprint"]
        if pool_reading(context.recipe, precomputed["pool"], len(labelled.class_names)) == "stream":
            inputs["reading"] = "stream"
    irrelevant = IRRELEVANT[settings.teacher] | {"reading", "workers"}  # of the former, what it comes to is an input
    if settings.correction == "auto" or settings.teacher == "none":
        irrelevant = irrelevant | {"correction"}  # it is the targets'
    basis = training_basis(context, settings, irrelevant, **inputs)
    chosen = basis["settings"].get("calibrator", {})
    if not settings.calibrator.image_weights:
        chosen.pop("image_weights", None)  # as before there were any
    if settings.calibrator.embedding:
        chosen.pop("embedding", None)  # likewise
    if settings.calibrator.clip_norm is None:
        chosen.pop("clip_norm", None)  # likewise
    outputs = network_outputs(folder)
    if settings.teacher == "calibrator":
        outputs.append(folder / CALIBRATOR)
    stage = training_stage(
        context,
        settings,
        folder,
        basis,
        lambda output: work(context, output, basis.get("reading", "memory")),
        name=stage_name("train-reduced", name),
        outputs=outputs,
        summary=lambda result: f"Student ({result['method']}): {on_validation(result)}",
        keeps_recipe=name is None,
    )
    return own_student(context, stage, "train-reduced", name)


def work(context: Context, output: Output, reading: Reading) -> dict[str, Any]:
    """Open the targets and train."""
    store = None
    if context.recipe.train_reduced.teacher != "none":
        store = open_targets(context)
    return train_reduced(context.assembly, output, store, reading)
