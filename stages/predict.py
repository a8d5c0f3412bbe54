"""`mpl predict`: a network + any images → a table of key and distribution."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.data.decode import default_workers
from pipeline.data.decoded import load_images
from pipeline.data.manifest import FileSpec, ImageSpec, Manifest, SplitSpec
from pipeline.data.readers.folder import FolderShard
from pipeline.data.readers.shard import Shard
from pipeline.data.sources import open_split
from pipeline.errors import DataError, UsageError
from pipeline.evaluate import predict_logits
from pipeline.models import load_network, to_device
from pipeline.storage.files import whole_file
from stages.evaluate import last_student
from stages.options import Context, stage_options

SUFFIXES = {".csv", ".parquet"}


@click.command()
@stage_options
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--network", type=click.Path(path_type=Path, file_okay=False),
              help="A network's folder. [default: the run's last student]")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("predictions.csv"),
              show_default=True, help="A .csv or .parquet file.")  # fmt: skip
def command(context: Context, inputs: tuple[Path, ...], network: Path | None, output: Path) -> None:
    """Classify images: files, folders, WebDataset tars or Parquet files.

    Writes one row per image: key, status, the predicted class and the probability of every class.
    """
    if output.suffix not in SUFFIXES:
        raise UsageError(f"--output {output}: expected a name that ends in .csv or .parquet")
    shards = [shard for path in inputs for shard in shards_of(path)]
    if context.dry_run:
        context.console.note(f"predict: would classify {sum(s.rows() for s in shards):,} images into {output}")
        return
    result = work(context, shards, network, output)
    context.console.note(
        f"predict: {result['images']:,} images classified, {result['skipped']:,} could not be read; {output}"
    )
    if context.as_json:
        click.echo(json.dumps(result))


def shards_of(path: Path) -> tuple[Shard, ...]:
    """Any images as shards: one file, a folder, a tar or a Parquet file."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    suffix = path.suffix.lower()
    reader = "folder" if path.is_dir() else {".tar": "webdataset", ".parquet": "parquet"}.get(suffix)
    if reader is None:
        return (FolderShard(path.stem, path.parent, (path.name,), (), with_labels=False),)
    path = path.resolve()
    manifest = Manifest.model_validate(
        {
            "name": "images",
            "classes": 2,  # not used: a pool has no labels
            "image": ImageSpec(size=1),
            "files": {"images": FileSpec(path=path.name, reader=reader)},
            "splits": {"unlabelled": SplitSpec.model_validate({"from": "images"})},
        }
    )
    return open_split(manifest, "unlabelled", path.parent).shards


def work(context: Context, shards: Sequence[Shard], network: Path | None, output: Path) -> dict[str, Any]:
    """Classify and write the table."""
    folder = network if network is not None else last_student(context)
    loaded = to_device(load_network(folder), context.device)
    samples = ((shard.name, sample) for shard in shards for sample in shard.read())
    images = load_images(samples, loaded.image_size, workers=default_workers(loaded.image_size))
    logits = predict_logits(
        loaded.model, images.images, loaded.mean, loaded.std,
        batch=context.recipe.evaluate.batch, device=context.device, autocast=context.placement.autocast,
    )  # fmt: skip
    p = logits.double().softmax(dim=1).numpy()  # (N, C)
    absent = [None] * len(images.skipped)
    columns: dict[str, Any] = {
        "key": images.keys + [entry.key for entry in images.skipped],
        "status": ["ok"] * len(images.keys) + [str(entry.status) for entry in images.skipped],
        "prediction": [loaded.class_names[c] for c in p.argmax(1)] + absent,
    }
    columns |= {name: pa.array([*p[:, c], *absent], pa.float64()) for c, name in enumerate(loaded.class_names)}
    table = pa.table(columns)
    with whole_file(output) as temporary:
        if output.suffix == ".csv":
            pyarrow.csv.write_csv(table, temporary)
        else:
            pyarrow.parquet.write_table(table, temporary)
    return {
        "images": len(images),
        "skipped": len(images.skipped),
        "network": str(folder),
        "output": str(output),
    }
