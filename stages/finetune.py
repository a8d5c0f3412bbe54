"""`mpl finetune`: student + labelled images → student-finetuned/."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options

if TYPE_CHECKING:
    from stages.execution import Stage


@click.command()
@stage_options
@click.option("--name", help="Finetune student-NAME/ into student-NAME-finetuned/.")
def command(context: Context, name: str | None) -> None:
    """Finetune the student on the labelled images alone.

    Reads: student/ and the labelled split. Writes: student-finetuned/.
    """
    from stages.execution import execute

    execute(context, lambda c: plan(c, name))


def plan(context: Context, name: str | None = None) -> "Stage":
    """Plan the stage."""
    from pipeline.checkpoints import CHECKPOINTS
    from stages.execution import Stage
    from stages.learning import network_outputs, split_of, training_basis
    from stages.students import stage_name, student_folder, trained

    source = student_folder(context, name)
    folder = context.run / f"{source.name}-finetuned"
    student = trained(context, name)
    basis = training_basis(
        context,
        context.recipe.finetune,
        labelled=split_of(context, "labelled").fingerprint(),
        student=student["result"]["weights_sha256"],
    )
    return Stage(
        name=stage_name("finetune", name),
        basis=basis,
        outputs=network_outputs(folder),
        leftovers=[folder / CHECKPOINTS],
        work=lambda: work(context, source, folder, basis),
        summary=lambda result: f"Finetuned student: {result['validation']['top1']:.2f}% on validation",
        replaces=[folder],
        keeps_recipe=name is None,
        together=True,
    )


def work(context: Context, source: Path, folder: Path, basis: dict[str, Any]) -> dict[str, Any]:
    """Train on with true labels, from the student's averaged weights."""
    from pipeline.models import load_network
    from pipeline.student_data import LabelledSet, Mixture, StudentData
    from pipeline.teachers import FixedTargets
    from stages.learning import load_split, split_of, to_device, train_and_save

    settings = context.recipe.finetune
    network = to_device(load_network(source), context.device)
    split = split_of(context, "labelled")
    images = load_split(context, split, network.image_size)
    data = StudentData(
        LabelledSet(images.images, images.labels),
        None,
        Mixture(settings.batch, 0, true_labels=True),
        settings,
        classes=len(split.class_names),
        mean=network.mean,
        std=network.std,
        seed=context.seed,
        device=context.device,
        ranks=context.together,
    )
    return train_and_save(context, network, FixedTargets(), data, settings, folder, basis)
