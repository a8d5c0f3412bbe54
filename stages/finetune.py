"""`mpl finetune`: student + labelled images → student-finetuned/."""

import click

from pipeline.trainings import finetune
from stages.basis import network_outputs, require_unchanged, training_basis, training_stage
from stages.console import on_validation
from stages.execution import Stage, execute
from stages.options import Context, stage_options
from stages.students import name_option, stage_name, student_folder, trained


@click.command()
@stage_options
@name_option("Finetune student-NAME/ into student-NAME-finetuned/.")
def command(context: Context, name: str | None) -> None:
    """Finetune the student on the labelled images alone.

    Reads: student/ and the labelled split. Writes: student-finetuned/.
    """
    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> Stage:
    """Plan the stage."""
    source = student_folder(context, name)
    folder = context.run / f"{source.name}-finetuned"
    student = trained(context, name)["result"]
    require_unchanged(source, student)
    basis = training_basis(
        context,
        context.recipe.finetune,
        labelled=context.data_set.split("labelled").fingerprint(),
        student=student["weights_sha256"],
    )
    return training_stage(
        context,
        context.recipe.finetune,
        folder,
        basis,
        lambda output: finetune(context.assembly, output, source),
        name=stage_name("finetune", name),
        outputs=network_outputs(folder),
        summary=lambda result: f"Finetuned student: {on_validation(result)}",
        keeps_recipe=name is None,
    )
