"""Whether the splits of a data set can be used, and what is in them."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.data.decode import Skipped, Status, decode_stream
from pipeline.data.manifest import Manifest, SplitName
from pipeline.data.readers.shard import LeftOut
from pipeline.data.sources import Split, open_split
from pipeline.errors import DataError
from pipeline.storage.files import Location

SIZE = 32  # pixels: enough to see whether an image decodes


@dataclass
class SplitReport:
    """What was found in a split."""

    problem: str | None = None
    """Why the split cannot be used; None if it can."""
    rows: int = 0
    shards: int = 0
    per_class: dict[str, int] = field(default_factory=dict)
    """Labelled images of each class; empty for a pool."""
    read: int = 0
    """Entries whose bytes were looked at; the rest of this report is about them."""
    undecodable: list[Skipped] = field(default_factory=list)
    repeated_keys: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    """What lies in the source beside the rows."""


def check_split(
    manifest: Manifest, split: SplitName, data: Location | None, *, sample: int | None = 256, workers: int = 0
) -> SplitReport:
    """Open a split, count it, check its labels and decode part of it.

    Args:
        manifest: the data set.
        split: which one.
        data: the data folder, or None for the manifest's own.
        sample: entries to decode, spread over the shards from each one's start; None is all.
        workers: threads that decode.
    """
    report = SplitReport()
    try:
        opened = open_split(manifest, split, data)
        report.shards, report.rows = len(opened.shards), opened.count()
        if opened.labelled:
            counts = Counter(opened.labels().tolist())
            report.per_class = {name: counts[label] for label, name in enumerate(opened.class_names)}
        report.left_out = [entry for _, entry in opened.left_out()]
        _decode(opened, report, sample, workers)
        if report.read == len(report.undecodable):
            report.problem = f"none of the {report.read} entries looked at is an image"
    except DataError as error:
        report.problem = str(error)
    return report


def _decode(split: Split, report: SplitReport, sample: int | None, workers: int) -> None:
    per_shard = None if sample is None else -(-sample // len(split.shards))
    entries = ((shard.name, sample) for shard in split.shards for sample in shard.read(0, per_shard))
    keys: Counter[str] = Counter()
    stream = decode_stream(entries, SIZE, workers, data_of=lambda entry: entry[1].data)
    for (shard, entry), _, status, detail in stream:
        report.read += 1
        keys[entry.key] += 1
        if status is not Status.ok:
            report.undecodable.append(Skipped(shard, entry.row, entry.key, status, detail))
    report.repeated_keys = [key for key, count in keys.items() if count > 1]
