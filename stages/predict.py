"""`mpl predict`: a network + any images → a table with a row for each."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from pipeline.answers.forms import OURS
from pipeline.data.decode import MAX_BYTES, Status, decode_stream, default_workers
from pipeline.data.get.archives import is_archive, list_members, read_members
from pipeline.data.readers.folder import list_files, shown
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.readers.shard import LeftOut
from pipeline.errors import DataError, UsageError
from pipeline.evaluate import predict_logits
from pipeline.networks.loading import load_network
from pipeline.networks.network import Network, to_device
from pipeline.storage.files import read_at_most, whole_file
from stages.evaluate import last_student
from stages.networks import architecture_option, shown_by
from stages.options import Context, stage_options

SUFFIXES = {".csv", ".parquet"}
NONFINITE = "nonfinite"
HARMLESS = {"ok", "no_image", "hidden", "another_view"}  # states of what can be read, or need not be
HEAD = ("key", "status", "detail", "prediction")  # the first columns of a table


class Entry(NamedTuple):
    """Something to classify, or what lies beside it and is no image."""

    key: str
    data: bytes
    left_out: LeftOut | None = None


@dataclass
class Table:
    """The rows so far, in the order of the input. Probabilities are float64, (C,), NaN where there are none."""

    keys: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)


@click.command()
@stage_options
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--network", type=click.Path(path_type=Path),
              help="A network's folder, or a file of weights. [default: the run's last student]")  # fmt: skip
@architecture_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("predictions.csv"),
              show_default=True, help="A .csv or .parquet file.")  # fmt: skip
def command(
    context: Context, inputs: tuple[Path, ...], network: Path | None, architecture: str | None, output: Path
) -> None:
    """Classify images: files, folders, archives (.tar, .tar.gz, .zip, WebDataset) or Parquet files.

    Writes a row for everything that is found, in its order: key (the path as given), status, detail, prediction, and
    the probability of every class, in columns p:CLASS. Exit status 1 if something could not be read.
    """
    if output.suffix not in SUFFIXES:
        raise UsageError(f"--output {output}: expected a name that ends in .csv or .parquet")
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path} does not exist")
    require_replaceable(output, inputs)
    if context.dry_run:
        context.console.note(f"predict: would classify {', '.join(map(str, inputs))} into {output}")
        return
    result = work(context, inputs, network, architecture, output)
    states = ", ".join(f"{count:,} {state}" for state, count in result["states"].items())
    context.console.note(f"predict: {sum(result['states'].values()):,} entries found: {states}; {output}")
    if context.as_json:
        click.echo(json.dumps(result))
    if result["unreadable"]:
        raise click.exceptions.Exit(1)


def require_replaceable(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write over what is no table of ours, or is to be classified.

    Raises:
        UsageError: says what is there.
    """
    if not output.exists():
        return
    for path in inputs:
        if path.samefile(output):
            raise UsageError(f"--output {output} is one of the inputs; give it another name")
    try:
        if output.suffix == ".csv":
            with output.open(newline="", encoding="utf-8") as file:
                head = next(csv.reader(file), [])
        else:
            head = pyarrow.parquet.read_schema(output).names
    except (OSError, ValueError, csv.Error, pa.ArrowException):
        head = []
    if tuple(head[: len(HEAD)]) != HEAD:
        raise UsageError(f"--output {output} is there, and is no table that mpl predict wrote; give another name")


def entries(inputs: Iterable[Path]) -> Iterator[Entry]:
    """Everything in the inputs, in order, keys unique.

    Raises:
        DataError: an archive or a table is cut short, or a folder cannot be listed.
    """
    seen = Counter[str]()
    for path in inputs:
        for entry in _entries(path):
            seen[entry.key] += 1
            again = seen[entry.key]
            yield entry if again == 1 else entry._replace(key=f"{entry.key}#{again}")


def _entries(path: Path) -> Iterator[Entry]:
    where = shown(str(path))
    if path.is_dir():
        images, others = list_files(path)
        left_out = {entry.key: entry for entry in others}
        for file in sorted([*images, *left_out]):
            entry = left_out.get(file)
            yield Entry(f"{where}/{shown(file)}", b"" if entry else _read(path / file), entry)
    elif is_archive(path):
        for member in read_members(path):
            yield Entry(f"{where}/{member.name}", member.data)
        yield from (Entry(f"{where}/{entry.key}", b"", entry) for entry in list_members(path)[2])
    elif path.suffix.lower() == ".parquet":
        for sample in ParquetShard(path.stem, path, label=None).read():
            yield Entry(f"{where}/{sample.key}", sample.data)
    else:
        yield Entry(where, _read(path))


def _read(path: Path) -> bytes:
    try:
        return read_at_most(path, MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def work(
    context: Context, inputs: Iterable[Path], network: Path | None, architecture: str | None, output: Path
) -> dict[str, Any]:
    """Classify and write the table."""
    folder = network if network is not None else last_student(context)
    loaded = to_device(load_network(folder, architecture, shown_by(context)), context.device)
    table = classified(context, loaded, entries(inputs))
    write(table, loaded.class_names, output)
    states = Counter(table.states)
    return {
        "images": states["ok"],
        "skipped": len(table.keys) - states["ok"],
        "unreadable": sum(count for state, count in states.items() if state not in HARMLESS),
        "states": dict(states),
        "network": str(folder),
        "output": str(output),
    }


def classified(context: Context, network: Network, found: Iterable[Entry]) -> Table:
    """Decode and classify, a batch of images at a time."""
    table, size = Table(), network.image_size
    nothing = np.full(len(network.class_names), np.nan)
    pixels: list[np.ndarray] = []
    rows: list[int] = []

    def flush() -> None:
        if not rows:
            return
        logits = predict_logits(
            network.model, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), network.mean, network.std,
            batch=len(rows), device=context.device, autocast=context.placement.autocast,
        )  # fmt: skip
        for row, finite, p in zip(rows, logits.isfinite().all(1), logits.double().softmax(1).numpy(), strict=True):
            if finite:
                table.probabilities[row] = p
            else:
                table.states[row], table.details[row] = NONFINITE, "the network's logits are not finite"
        pixels.clear()
        rows.clear()

    for entry, image, status, detail in decode_stream(
        found, size, default_workers(size), data_of=lambda e: e.data, framing=network.framing
    ):
        table.keys.append(entry.key)
        table.states.append(str(status) if entry.left_out is None else entry.left_out.reason)
        table.details.append(detail if entry.left_out is None else entry.left_out.detail)
        table.probabilities.append(nothing)
        if status is Status.ok and image is not None:
            pixels.append(image)
            rows.append(len(table.keys) - 1)
            if len(rows) == context.recipe.evaluate.batch:
                flush()
    flush()
    return table


def write(table: Table, class_names: list[str], output: Path) -> None:
    """The table as CSV or Parquet, whole or not at all."""
    p = np.stack(table.probabilities) if table.keys else np.zeros((0, len(class_names)))
    known = ~np.isnan(p).any(axis=1)
    best = np.where(known, np.nan_to_num(p).argmax(1), -1)
    columns: dict[str, Any] = {
        "key": pa.array(table.keys, pa.string()),
        "status": pa.array(table.states, pa.string()),
        "detail": pa.array(table.details, pa.string()),
        "prediction": pa.array([class_names[c] if c >= 0 else None for c in best], pa.string()),
    }
    for c, name in enumerate(class_names):
        columns[OURS + name] = pa.array(p[:, c], pa.float64(), mask=~known)
    with whole_file(output) as temporary:
        if output.suffix == ".csv":
            pyarrow.csv.write_csv(pa.table(columns), temporary)
        else:
            pyarrow.parquet.write_table(pa.table(columns), temporary)
