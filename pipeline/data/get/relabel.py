"""A data set with other labels: what a person chose for images of its labelled split or its pool, as a new folder.

The table is CSV with a head: shard, row, key, label (others are ignored); an empty label leaves a labelled image out,
and a pool image where it is. Validation and test images stay what they are: nobody chooses what is judged.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

from pipeline.classes import SHOWN
from pipeline.data.get.importing import POOL_FILE, ROWS_PER_FILE, new_folder
from pipeline.data.get.writing import Row, write_images, write_manifest
from pipeline.data.manifest import SPLITS, FileSpec, Manifest, SplitName, SplitSpec, load_manifest
from pipeline.data.readers.shard import NO_LABEL
from pipeline.data.sources import Split, open_split
from pipeline.errors import DataError

HEAD = ("shard", "row", "key", "label")
Identity = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """What a person said of an image; `label` None: it is left out."""

    key: str
    label: str | None
    line: int


@dataclass(frozen=True)
class Relabelled:
    """What became of the answers.

    Attributes:
        changed, confirmed, left_out: labelled images.
        added: pool images that are labelled now.
        labelled, unlabelled: images of the new data set.
    """

    changed: int
    confirmed: int
    left_out: int
    added: int
    labelled: int
    unlabelled: int


def read_answers(path: Path) -> dict[Identity, Answer]:
    """A table of answers.

    Raises:
        DataError: it cannot be read, is cut short, lacks a column, or says two things of one image.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table of answers: {error}") from error
    if text and not text.endswith("\n"):
        raise DataError(f"{path} is cut short: its last line has no end. Save it again")
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    answers: dict[Identity, Answer] = {}
    try:
        head = next(reader, [])
        if missing := [name for name in HEAD if name not in head]:
            raise DataError(f"{path} has no column {', '.join(missing)}; its first line must name {', '.join(HEAD)}")
        places = [head.index(name) for name in HEAD]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(head):
                raise DataError(f"{path} line {reader.line_num}: {len(cells)} cells, and the head has {len(head)}")
            shard, row, key, label = (cells[place] for place in places)
            if not row.isascii() or not row.isdigit():
                raise DataError(f"{path} line {reader.line_num}: row {row!r} is no number")
            answer = Answer(key, label or None, reader.line_num)
            before = answers.setdefault((shard, int(row)), answer)
            if before.label != answer.label:
                raise DataError(
                    f"{path} says two things of {key}: {before.label!r} in line {before.line} and {answer.label!r} in "
                    f"line {answer.line}"
                )
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is no CSV: {error}") from error
    if not answers:
        raise DataError(f"{path} has no answer")
    return answers


def relabel(data: Path, answers: dict[Identity, Answer], out: Path) -> Relabelled:
    """Write the data set of the folder `data` with these answers as the new folder `out`; it appears whole.

    Raises:
        DataError: an answer is of no image that is there, names another image than is there, or a class that is not;
            a class would be left without an image; `out` is in use.
        RunError: `out` cannot be written.
    """
    manifest = load_manifest(data / "manifest.yaml")
    if manifest.splits["labelled"].draw is not None or any(spec.without for spec in manifest.splits.values()):
        raise DataError(f"{data} draws its labelled images anew for each seed: there are no labels to change")
    present = [name for name in SPLITS if name in manifest.splits]
    splits = {name: open_split(manifest, name, data) for name in present}
    names = splits["labelled"].class_names
    _require_classes(answers, names)
    left = dict(answers)
    with new_folder(out) as work:
        added: list[Row] = []
        unlabelled = 0
        if "unlabelled" in splits:
            stays = _not_labelled(splits["unlabelled"], left, names, added)
            for number in count():
                if (first := next(stays, None)) is None:
                    break
                file = Counted(chain([first], islice(stays, ROWS_PER_FILE - 1)))
                write_images(work / POOL_FILE.format(number), file, None)
                unlabelled += file.rows
        outcome = Counter[str]()
        kept = Counted(chain(_with_answers(splits["labelled"], left, names, outcome), added))
        write_images(work / "labelled.parquet", kept, names)
        _require_all(left, data)
        _require_every_class(kept.labels, names)
        for name in ("validation", "test"):
            if name in splits:
                write_images(work / f"{name}.parquet", (row for _, row in _rows(splits[name])), names)
        write_manifest(work / "manifest.yaml", _manifest(manifest, out.resolve().name, names, splits, unlabelled))
    return Relabelled(
        changed=outcome["changed"],
        confirmed=outcome["confirmed"],
        left_out=outcome["left out"],
        added=len(added),
        labelled=kept.rows,
        unlabelled=unlabelled,
    )


class Counted(Iterator[Row]):
    """Rows that are counted, and their labels, while they are written."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._source, self.rows, self.labels = rows, 0, Counter[int]()

    def __next__(self) -> Row:
        row = next(self._source)
        self.rows += 1
        self.labels[row.label] += 1
        return row


def _not_labelled(pool: Split, left: dict[Identity, Answer], names: tuple[str, ...], added: list[Row]) -> Iterator[Row]:
    """The pool's images that have no label now; the others go to `added`."""
    for identity, row in _rows(pool):
        answer = _taken(left, identity, row)
        if answer is not None and answer.label is not None:
            added.append(row._replace(label=names.index(answer.label)))
        else:
            yield row


def _with_answers(
    labelled: Split, left: dict[Identity, Answer], names: tuple[str, ...], outcome: Counter[str]
) -> Iterator[Row]:
    """The labelled images as the answers have them; `outcome` counts what became of them."""
    for identity, row in _rows(labelled):
        answer = _taken(left, identity, row)
        if answer is None:
            yield row
        elif answer.label is None:
            outcome["left out"] += 1
        else:
            label = names.index(answer.label)
            outcome["confirmed" if label == row.label else "changed"] += 1
            yield row._replace(label=label)


def _rows(split: Split) -> Iterator[tuple[Identity, Row]]:
    for shard, sample in split.read():
        yield (shard, sample.row), Row(sample.key, sample.data, sample.label if split.labelled else NO_LABEL)


def _taken(left: dict[Identity, Answer], identity: Identity, row: Row) -> Answer | None:
    """The answer about an image, which is then no longer left."""
    answer = left.pop(identity, None)
    if answer is not None and answer.key != row.key:
        raise DataError(
            f"line {answer.line} is of {answer.key}, and {identity[0]} row {identity[1]} is {row.key}: these answers "
            "are of another data set, or of an earlier state of it"
        )
    return answer


def _require_classes(answers: dict[Identity, Answer], names: tuple[str, ...]) -> None:
    for answer in answers.values():
        if answer.label is not None and answer.label not in names:
            known = ", ".join(names[:SHOWN]) + ("…" if len(names) > SHOWN else "")
            raise DataError(f"line {answer.line}: {answer.label!r} is no class of the data set; there are {known}")


def _require_all(left: dict[Identity, Answer], data: Path) -> None:
    if left:
        (shard, row), answer = next(iter(left.items()))
        raise DataError(
            f"{len(left):,} answers are of no labelled and no pool image of {data}, such as line {answer.line}: "
            f"{answer.key} ({shard} row {row})"
        )


def _require_every_class(present: Counter[int], names: tuple[str, ...]) -> None:
    if absent := [name for label, name in enumerate(names) if label not in present]:
        raise DataError(f"no labelled image of {', '.join(absent[:SHOWN])} would be left; keep one of each class")


def _manifest(
    manifest: Manifest, name: str, names: tuple[str, ...], splits: dict[SplitName, Split], unlabelled: int
) -> Manifest:
    named: list[SplitName] = [split for split in splits if split != "unlabelled"]
    files = {str(split): FileSpec(path=f"{split}.parquet", reader="parquet") for split in named}
    specs: dict[SplitName, SplitSpec] = {split: SplitSpec.model_validate({"from": split}) for split in named}
    if unlabelled:
        files["pool"] = FileSpec(glob=POOL_FILE.format(0).replace("00000", "*"), reader="parquet")
        specs["unlabelled"] = SplitSpec.model_validate({"from": "pool"})
    return Manifest(
        name=name,
        title=manifest.title,
        homepage=manifest.homepage,
        license=manifest.license,
        classes=len(names),
        class_names=names,
        image=manifest.image,
        files=files,
        splits=specs,
        notes=f"{manifest.name}, with labels that a person chose.",
    )
