"""`mpl data`: what data sets there are, getting them, whether they can be used, and a person's own made into one."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pipeline.data.get.check import SplitReport, check_split
from pipeline.data.get.fetch import fetch as fetch_files
from pipeline.data.get.found import Source
from pipeline.data.get.importing import look_at
from pipeline.data.manifest import Manifest, list_manifests, load_manifest, own_manifest
from pipeline.data.sources import find_files
from pipeline.errors import DataError, UsageError
from pipeline.storage.files import Location, location
from stages.data_import import as_result, tell
from stages.data_import import command as import_
from stages.data_label import command as label
from stages.terminal import say

SHOWN = 5  # examples of each kind of trouble, for people; --json has all


class DataFolder(click.ParamType):
    """A folder on disk or a URL of object storage (`s3://bucket/prefix`)."""

    name = "DIR|URL"

    def __init__(self, *, exists: bool = True) -> None:
        self.exists = exists

    def convert(self, value: str | Location, param: click.Parameter | None, ctx: click.Context | None) -> Location:
        if not isinstance(value, str):
            return value
        if "://" not in value:
            return click.Path(path_type=Path, exists=self.exists, file_okay=False).convert(value, param, ctx)
        return location(value)


data_option = click.option(
    "--data", type=DataFolder(), envvar="MPL_DATA", show_envvar=True, help="Data folder, or s3://bucket/prefix."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output."
)
workers_option = click.option(
    "--workers", type=click.IntRange(0), default=0, help="Threads that decode; worth it for large images."
)


@click.group()
def group() -> None:
    """List, fetch, check and import data sets."""


@group.command("list")
@data_option
@json_option
def list_(data: Location | None, as_json: bool) -> None:
    """List the data sets whose manifests are known, and whether their files are there."""
    manifests = [(manifest, _missing(manifest, data)) for manifest in list_manifests(data)]
    for manifest, missing in manifests:
        state = f"needs {missing}" if missing else "ready"
        say(f"{manifest.name:<20} {manifest.classes:>5} classes  {state:<36}  {manifest.title}")
    if as_json:
        rows = [
            {"name": manifest.name, "title": manifest.title, "classes": manifest.classes, "missing": missing}
            for manifest, missing in manifests
        ]
        click.echo(json.dumps({"manifests": rows}, ensure_ascii=False))


@group.command()
@click.argument("manifest", required=False)
@data_option
@click.option("--sample", type=click.IntRange(1), default=256, show_default=True, help="Entries to decode per split.")
@click.option("--all", "everything", is_flag=True, help="Decode every entry.")
@workers_option
@json_option
def check(
    manifest: str | None, data: Location | None, sample: int, everything: bool, workers: int, as_json: bool
) -> None:
    """Open each split of MANIFEST, count it and decode a sample.

    MANIFEST is a name, a YAML file or a folder that `mpl data import` made; by default the one in --data, else digits.
    Of any other folder, archive or table it says what `mpl data import` would make of it, and writes nothing.
    Exit status 1 if a split cannot be used.
    """
    if manifest is not None and Path(manifest).exists() and not _is_described(Path(manifest)):
        found = look_at([Source(Path(manifest))], workers=workers)
        tell(found)
        if as_json:
            click.echo(json.dumps(as_result(found), ensure_ascii=False))
        return
    own = own_manifest(data) if data is not None else None
    described = own if own is not None and manifest is None else load_manifest(manifest or "digits", data)
    reports = {}
    for split in described.splits:
        reports[split] = check_split(described, split, data, sample=None if everything else sample, workers=workers)
        _say_report(split, reports[split])
    usable = all(report.problem is None for report in reports.values())
    if as_json:
        result = {split: asdict(report) for split, report in reports.items()}
        click.echo(json.dumps({"manifest": described.name, "usable": usable, "splits": result}, ensure_ascii=False))
    if not usable:
        raise click.exceptions.Exit(1)


@group.command()
@click.argument("manifest")
@click.option(
    "--data",
    type=DataFolder(exists=False),
    envvar="MPL_DATA",
    show_envvar=True,
    help="Data folder on disk; made if need be.",
)
@click.option("--only", multiple=True, metavar="FILE", help="An entry of the manifest's `files`; may be repeated.")
@json_option
def fetch(manifest: str, data: Location | None, only: tuple[str, ...], as_json: bool) -> None:
    """Download the files of MANIFEST (a name or a YAML file) into the data folder, and verify them.

    What is there and right is left alone; what was interrupted goes on. Exit status 1 if files remain that
    cannot be downloaded; for each it says what to do.
    """
    if not isinstance(data, Path):
        raise UsageError("mpl data fetch needs a folder on disk for what it downloads: use --data DIR or set MPL_DATA")
    described = load_manifest(manifest, data)
    files = []
    with _Bars() as bars:
        for fetched in fetch_files(described, data, only=only, progress=bars.show):
            bars.close()
            say(f"{fetched.name}: {fetched.state}{': ' if fetched.detail else ''}{fetched.detail}")
            files.append(fetched)
    complete = all(fetched.state != "missing" for fetched in files)
    if as_json:
        result = {"manifest": described.name, "complete": complete, "files": [asdict(fetched) for fetched in files]}
        click.echo(json.dumps(result, ensure_ascii=False))
    if not complete:
        raise click.exceptions.Exit(1)


def _is_described(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") or (path / "manifest.yaml").is_file()


class _Bars:
    """One bar of bytes at a time, on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, name: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = tqdm(
                desc=name,
                initial=done,
                total=total,
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                disable=None,
                leave=False,
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _missing(manifest: Manifest, data: Location | None) -> str | None:
    """The first file of a manifest that is not in the data folder."""
    for spec in manifest.files.values():
        try:
            find_files(manifest, spec, data)
        except DataError:
            return spec.path or spec.glob
    return None


def _say_report(split: str, report: SplitReport) -> None:
    if report.problem is not None:
        say(f"{split}: cannot be used: {report.problem}")
        return
    counts = report.per_class.values()
    classes = f", {len(counts)} classes of {min(counts):,} to {max(counts):,}" if counts else ""
    say(f"{split}: {report.rows:,} rows in {report.shards} shard(s){classes}; {report.read:,} decoded")
    if absent := [name for name, count in report.per_class.items() if not count]:
        _say_some("classes without an image", absent)
    _say_some("entries that are no image", [f"{bad.key} ({bad.detail})" for bad in report.undecodable])
    _say_some("keys that occur more than once", report.repeated_keys)
    _say_some("more files, which are not used", [f"{entry.key} ({entry.detail})" for entry in report.left_out])


def _say_some(what: str, items: list[str]) -> None:
    if items:
        more = f", … ({len(items) - SHOWN:,} more)" if len(items) > SHOWN else ""
        say(f"  {len(items):,} {what}: {', '.join(items[:SHOWN])}{more}")


group.add_command(import_)
group.add_command(label)
