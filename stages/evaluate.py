"""`mpl evaluate`: a network + a split → evaluation.json, and a file for each network and split in evaluations/."""

from pathlib import Path
from typing import Any

import click

from pipeline.networks.architectures import WEIGHTS
from pipeline.networks.classes import order_or_assumed, with_classes_of
from pipeline.networks.folders import read_description
from pipeline.networks.loading import load_network
from pipeline.networks.network import to_device
from pipeline.storage.files import sha256_file, write_json
from stages.basis import require_unchanged
from stages.execution import Stage, execute
from stages.networks import architecture_option, network_folder
from stages.options import Context, assume_option, stage_options, with_changes
from stages.students import name_option, stage_name, student_folder, trained

TOP5_FROM = 6  # classes from which on the five most probable are not nearly all
SHOWN = 20  # classes in the table; of more, the least accurate
CONFUSIONS = 10  # pairs of classes that are told
MATRIX = 12  # classes up to which the whole matrix is


@click.command()
@stage_options
@click.option("--network", type=click.Path(path_type=Path),
              help="A network's folder, or a file of weights. [default: the run's last student]")  # fmt: skip
@architecture_option
@assume_option
@click.option("--split", type=click.Choice(["test", "validation", "labelled"]), help="[default: test]")
@name_option("Judge student-NAME/ and write evaluation-NAME.json.")
def command(
    context: Context,
    network: Path | None,
    architecture: str | None,
    assume_class_order: bool,
    split: str | None,
    name: str | None,
) -> None:
    """Judge a network: accuracy with its 95% interval, NLL, ECE, accuracy per class, and who is taken for whom.

    Reads: a network and a split. Writes: evaluation.json for the run's last student; and, for every network and split,
    evaluations/NETWORK-SPLIT.json, none of which overwrites another.
    """
    context = with_changes(context, evaluate__split=split)
    if network is not None:
        network = network_folder(context, network, architecture)
    record = execute(context, lambda c: plan(c, network, name, assume_class_order))
    if "confusion" in record.get("result", {}):
        for line in [*class_table(record["result"]), *confusions(record["result"])]:
            context.console.note(line)


def last_student(context: Context, name: str | None = None) -> Path:
    """student-finetuned/ where `finetune` came after the training, else student/.

    Raises:
        RunError: there is no student yet.
        CheckpointError: it was edited or damaged since it was made.
    """
    record = trained(context, name)
    folder = student_folder(context, name)
    finetuned = context.run.record(stage_name("finetune", name))
    if finetuned is not None and finetuned["basis"]["student"] == record["result"]["weights_sha256"]:
        folder, record = context.run / f"{folder.name}-finetuned", finetuned
    require_unchanged(folder, record["result"])
    return folder


def plan(
    context: Context, network: Path | None = None, name: str | None = None, assume_class_order: bool = False
) -> Stage:
    """Plan the stage."""
    folder = network if network is not None else last_student(context, name)
    if not (folder / WEIGHTS).is_file():
        load_network(folder)  # for its message
    settings, digest = context.recipe.evaluate, sha256_file(folder / WEIGHTS)
    is_of, names = read_description(folder), context.data_set.split(context.recipe.evaluate.split).class_names
    order_or_assumed(is_of.class_names, is_of.arguments["num_classes"], names, str(folder), assume_class_order)
    basis = {
        "settings": settings.model_dump(mode="json"),
        "network": digest,
        "preprocessing": is_of.preprocessing(),
        "split": context.data_set.split(settings.split).fingerprint(),
        "precision": context.precision,
    }
    label = f"{label_of(context, folder, digest)}-{settings.split}"
    own = context.run / "evaluations" / f"{label}.json"
    outputs = [own]
    stage = f"evaluate-network-{label}"
    if network is None or name is not None:
        outputs.append(context.run / (f"evaluation-{name}.json" if name else "evaluation.json"))
        stage = f"evaluate-{name}" if name else "evaluate"
    return Stage(
        name=stage,
        basis=basis,
        outputs=outputs,
        work=lambda: work(context, folder, outputs, assume_class_order),
        summary=lambda result: summary(folder.name, result),
        cheap=frozenset(basis),
        keeps_recipe=False,
    )


def label_of(context: Context, folder: Path, digest: str) -> str:
    """What a network is called in evaluations/: by its place in the run, others by name and weights."""
    run, place = context.run.root.resolve(), folder.resolve()
    return "-".join(place.relative_to(run).parts) if place.is_relative_to(run) else f"{folder.name}-{digest[:8]}"


def work(context: Context, folder: Path, outputs: list[Path], assume_class_order: bool = False) -> dict[str, Any]:
    """Evaluate and write the files."""
    settings = context.recipe.evaluate
    network = to_device(load_network(folder), context.device)
    split = context.data_set.split(settings.split)
    network = with_classes_of(network, split.class_names, str(folder), assume_class_order)
    to_device(network, context.device)
    images = context.data_set.images(split, network.image_size, network.framing)
    evaluation = context.assembly.judge(images, network)(network.model)
    result = {
        "format": 1,
        "network": str(folder),
        "split": settings.split,
        "skipped": len(images.skipped),
        **evaluation.whole_json(list(split.class_names)),
    }
    for output in outputs:
        write_json(output, result)
    return result


def summary(name: str, result: dict[str, Any]) -> str:
    """The figures in one line, beside what they are to be compared with."""
    low, high = result.get("top1_interval") or (None, None)
    text = f"{name} on {result['split']} ({result['images']:,} images): top-1 {result['top1']:.2f}%"
    if low is not None:
        text += f" (95% interval {low:.1f} to {high:.1f}; always the most frequent class: {result['majority']:.1f}%)"
    if len(result["per_class"]) >= TOP5_FROM:
        text += f", top-5 {result['top5']:.2f}%"
    return text + f", NLL {result['nll']:.4f}, ECE {result['ece']:.2f}%"


def class_table(result: dict[str, Any]) -> list[str]:
    """Accuracy of each class with its interval, as lines; of many classes the least accurate."""
    rows = [(name, value) for name, value in result["per_class"].items() if value is not None]
    shown = sorted(rows, key=lambda row: row[1])[:SHOWN] if len(rows) > SHOWN else rows
    width = max([5, *(len(name) for name, _ in shown)])
    lines = [f"{'class':<{width}}  {'images':>7}  {'top-1, %':>8}  95% interval"]
    for name, value in shown:
        low, high = result["per_class_interval"][name]
        lines.append(f"{name:<{width}}  {result['images_per_class'][name]:>7,}  {value:>8.1f}  {low:.1f} to {high:.1f}")
    if len(shown) < len(rows):
        lines.append(f"… and {len(rows) - len(shown):,} classes that are more accurate; evaluations/ has all")
    return lines


def confusions(result: dict[str, Any]) -> list[str]:
    """Who is taken for whom, as lines: the matrix of few classes, the most frequent pairs of many."""
    names, matrix = list(result["per_class"]), result["confusion"]
    if len(names) <= MATRIX:
        width = max(7, *(len(name) for name in names))
        lines = [f"{'taken for':>{width}}  " + "  ".join(f"{name:>{width}}" for name in names)]
        for name in names:
            lines.append(f"{name:>{width}}  " + "  ".join(f"{matrix[name].get(other, 0):>{width}}" for other in names))
        return lines
    pairs = [(count, a, b) for a, row in matrix.items() for b, count in row.items() if a != b]
    most = sorted(pairs, key=lambda pair: -pair[0])[:CONFUSIONS]
    return ["most often taken for another: " + ", ".join(f"{a} for {b} ({count})" for count, a, b in most)]
