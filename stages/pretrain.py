"""`mpl pretrain`: labelled images → teacher/."""

import click

from pipeline.assembly import Output
from pipeline.checkpoints import CHECKPOINTS
from pipeline.storage.files import fingerprint
from pipeline.trainings import pretrain
from stages.basis import network_outputs, training_basis
from stages.console import on_validation
from stages.execution import Stage, execute
from stages.options import Context, stage_options


@click.command()
@stage_options
def command(context: Context) -> None:
    """Train the large teacher on the labelled images.

    Reads: the labelled split. Writes: teacher/model.safetensors, config.json, metrics.csv.
    """
    execute(context, plan)


def plan(context: Context) -> Stage:
    """Plan the stage."""
    folder = context.run / "teacher"
    labelled = context.data_set.split("labelled").fingerprint()
    basis = training_basis(context, context.recipe.pretrain, labelled=labelled)
    return Stage(
        name="pretrain",
        basis=basis,
        outputs=network_outputs(folder),
        leftovers=[folder / CHECKPOINTS],
        work=lambda: pretrain(context.assembly, Output(folder, fingerprint(basis))),
        summary=lambda result: f"Teacher: {on_validation(result)}",
        replaces=[folder],
        together=True,
    )
