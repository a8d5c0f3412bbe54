"""`mpl pretrain`: labelled images → teacher/."""

from typing import TYPE_CHECKING, Any

import click

from stages.options import Context, stage_options

if TYPE_CHECKING:
    from stages.execution import Stage


@click.command()
@stage_options
def command(context: Context) -> None:
    """Train the large teacher on the labelled images.

    Reads: the labelled split. Writes: teacher/model.safetensors, config.json, metrics.csv.
    """
    from stages.execution import execute

    execute(context, plan)


def plan(context: Context) -> "Stage":
    """Plan the stage."""
    from pipeline.checkpoints import CHECKPOINTS
    from stages.execution import Stage
    from stages.learning import network_outputs, split_of, training_basis

    folder = context.run / "teacher"
    labelled = split_of(context, "labelled")
    basis = training_basis(context, context.recipe.pretrain, labelled=labelled.fingerprint())
    return Stage(
        name="pretrain",
        basis=basis,
        outputs=network_outputs(folder),
        leftovers=[folder / CHECKPOINTS],
        work=lambda: work(context, basis),
        summary=lambda result: f"Teacher: {result['validation']['top1']:.2f}% on validation",
        replaces=[context.run / "teacher"],
        together=True,
    )


def work(context: Context, basis: dict[str, Any]) -> dict[str, Any]:
    """Train the teacher with true labels: the one loop, without feedback."""
    from pipeline.lessons import wrong_labels
    from pipeline.models import build_network
    from pipeline.student_data import LabelledSet, Mixture, StudentData
    from pipeline.teachers import FixedTargets
    from stages.learning import load_split, seed_initialisation, split_of, to_device, train_and_save

    data, settings = context.recipe.data, context.recipe.pretrain
    split = split_of(context, "labelled")
    images = load_split(context, split)
    seed_initialisation(context, "teacher")
    network = build_network(settings.model, split.class_names, data.image_size, data.mean, data.std)
    labels = wrong_labels(images.labels, settings.label_noise, len(split.class_names), context.seed)
    batches = StudentData(
        LabelledSet(images.images, labels),
        None,
        Mixture(settings.batch, 0, true_labels=True),
        settings,
        classes=len(split.class_names),
        mean=data.mean,
        std=data.std,
        seed=context.seed,
        device=context.device,
        ranks=context.together,
    )
    to_device(network, context.device)
    figures = train_and_save(context, network, FixedTargets(), batches, settings, context.run / "teacher", basis)
    return figures | {"labelled_images": len(images), "classes": len(split.class_names)}
