"""`mpl evaluate`: a network + a split → evaluation.json."""

from pathlib import Path
from typing import Any

import click

from pipeline.models import WEIGHTS, load_network, to_device
from pipeline.network_classes import with_classes_of
from pipeline.storage.files import sha256_file, write_json
from stages.execution import Stage, execute
from stages.options import Context, assume_option, stage_options, with_changes
from stages.students import stage_name, student_folder, trained


@click.command()
@stage_options
@click.option("--network", type=click.Path(path_type=Path, file_okay=False),
              help="A network's folder. [default: the run's last student]")  # fmt: skip
@assume_option
@click.option("--split", type=click.Choice(["test", "validation", "labelled"]), help="[default: test]")
@click.option("--name", help="Judge student-NAME/ and write evaluation-NAME.json.")
def command(
    context: Context, network: Path | None, assume_class_order: bool, split: str | None, name: str | None
) -> None:
    """Judge a network: top-1, top-5, NLL, ECE and accuracy per class.

    Reads: a network and a split. Writes: evaluation.json.
    """
    context = with_changes(context, evaluate__split=split)
    execute(context, lambda c: plan(c, network, name, assume_class_order))


def last_student(context: Context, name: str | None = None) -> Path:
    """student-finetuned/ where `finetune` came after the training, else student/.

    Raises:
        RunError: there is no student yet.
    """
    record = trained(context, name)
    folder = student_folder(context, name)
    finetuned = context.run.record(stage_name("finetune", name))
    if finetuned is not None and finetuned["basis"]["student"] == record["result"]["weights_sha256"]:
        return context.run / f"{folder.name}-finetuned"
    return folder


def plan(
    context: Context, network: Path | None = None, name: str | None = None, assume_class_order: bool = False
) -> Stage:
    """Plan the stage."""
    folder = network if network is not None else last_student(context, name)
    if not (folder / WEIGHTS).is_file():
        load_network(folder)  # for its message
    settings = context.recipe.evaluate
    basis = {
        "settings": settings.model_dump(mode="json"),
        "network": sha256_file(folder / WEIGHTS),
        "split": context.data_set.split(settings.split).fingerprint(),
        "precision": context.precision,
    }
    output = context.run / (f"evaluation-{name}.json" if name else "evaluation.json")
    return Stage(
        name=f"evaluate-{name}" if name else "evaluate",
        basis=basis,
        outputs=[output],
        work=lambda: work(context, folder, output, assume_class_order),
        summary=lambda result: (
            f"{folder.name} on {result['split']} ({result['images']:,} images): top-1 {result['top1']:.2f}%, "
            f"top-5 {result['top5']:.2f}%, NLL {result['nll']:.4f}, ECE {result['ece']:.2f}%"
        ),
        replaces=[output],
        cheap=frozenset(basis),
        keeps_recipe=False,
    )


def work(context: Context, folder: Path, output: Path, assume_class_order: bool = False) -> dict[str, Any]:
    """Evaluate and write the file."""
    settings = context.recipe.evaluate
    network = to_device(load_network(folder), context.device)
    split = context.data_set.split(settings.split)
    network = with_classes_of(network, split.class_names, str(folder), assume_class_order)
    images = context.data_set.images(split, network.image_size)
    evaluation = context.assembly.judge(images, network)(network.model)
    result = {
        "format": 1,
        "network": str(folder),
        "split": settings.split,
        "skipped": len(images.skipped),
        **evaluation.as_json(list(split.class_names)),
    }
    write_json(output, result)
    return result
