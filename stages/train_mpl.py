"""`mpl train-mpl`: labelled images + the pool → student/, by full Meta Pseudo Labels or by one method alone."""

from typing import Any

import click

from pipeline.trainings import mpl_settings, train_mpl, uses_pool
from stages.basis import network_outputs, require_engine, training_basis, training_stage
from stages.console import on_validation
from stages.execution import Stage, execute
from stages.options import Context, stage_options, with_changes
from stages.students import NAME_HELP, name_option, own_student, stage_name, student_folder


@click.command()
@stage_options
@click.option("--method", metavar="NAME", help="What trains the teacher: supervised, label_smoothing, randaugment, "
              "mixup, pseudo_labels, uda, fixmatch.")  # fmt: skip
@click.option("--feedback", type=click.Choice(["soft", "hard", "none"]),
              help="soft: exact, of soft labels. hard: of sampled labels. none: the teacher gets none.")  # fmt: skip
@click.option("--alone", is_flag=True, help="The method by itself, without a student: the baseline.")
@name_option(NAME_HELP)
def command(context: Context, method: str | None, feedback: str | None, alone: bool, name: str | None) -> None:
    """Train teacher and student together (Meta Pseudo Labels), or a baseline.

    Reads: the labelled split and the pool. Writes: student/model.safetensors, config.json, metrics.csv, and the
    teacher in student/teacher/.
    """
    context = with_changes(
        context, train_mpl__method=method, train_mpl__feedback=feedback, train_mpl__alone=True if alone else None
    )
    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> Stage:
    """Plan the stage."""
    settings = mpl_settings(context.recipe)
    by_gradient = settings.feedback == "soft" or settings.feedback_options.credit == "row"
    if by_gradient and settings.feedback != "none" and not settings.alone:
        require_engine(context, settings.model, settings.feedback_options)
    folder, teacher = student_folder(context, name), context.run / "teacher"
    inputs: dict[str, Any] = {"labelled": context.data_set.split("labelled").fingerprint()}
    if uses_pool(settings):
        inputs["pool"] = context.data_set.split("unlabelled").fingerprint()
    if not settings.alone and settings.teacher.start == "pretrain":
        inputs["teacher"] = context.run.require("pretrain", "mpl pretrain")["result"]["weights_sha256"]
    irrelevant = {"feedback", "feedback_options", "student_wait", "teacher"} if settings.alone else set()
    basis = training_basis(context, settings, irrelevant, **inputs)
    if settings.feedback_options.credit == "batch":
        basis["settings"].get("feedback_options", {}).pop("credit", None)  # as before there was another
    outputs = network_outputs(folder)
    if not settings.alone:
        outputs += network_outputs(folder / "teacher")
    stage = training_stage(
        context,
        settings,
        folder,
        basis,
        lambda output: train_mpl(context.assembly, output, teacher),
        name=stage_name("train-mpl", name),
        outputs=outputs,
        summary=lambda result: f"{result['method']}: {on_validation(result)}",
        keeps_recipe=name is None,
    )
    return own_student(context, stage, "train-mpl", name)
