"""`mpl pretrain`: labelled images → teacher/."""

import click

from pipeline.trainings import pretrain
from stages.basis import network_outputs, training_basis, training_stage
from stages.console import on_validation
from stages.execution import Stage, execute
from stages.options import Context, stage_options


@click.command()
@stage_options
def command(context: Context) -> None:
    """Train the large teacher on the labelled images.

    Reads: the labelled split. Writes: teacher/model.safetensors, config.json, metrics.csv; with pretrain.folds also
    out_of_fold.parquet, what networks that did not see an image say of it.
    """
    execute(context, plan)


def plan(context: Context) -> Stage:
    """Plan the stage."""
    folder = context.run / "teacher"
    labelled = context.data_set.split("labelled").fingerprint()
    irrelevant = frozenset[str]() if context.recipe.pretrain.folds else {"folds"}
    basis = training_basis(context, context.recipe.pretrain, irrelevant, labelled=labelled)
    return training_stage(
        context,
        context.recipe.pretrain,
        folder,
        basis,
        lambda output: pretrain(context.assembly, output),
        name="pretrain",
        outputs=network_outputs(folder),
        summary=lambda result: f"Teacher: {on_validation(result)}",
    )
