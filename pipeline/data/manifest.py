"""Manifests: which files a data set has, how they are read and which rows make up each split."""

import difflib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError, field_validator, model_validator

from pipeline.classes import canonical
from pipeline.errors import DataError
from pipeline.storage.files import Location, opened
from pipeline.yaml_text import parse_yaml

Reader = Literal["digits", "parquet", "folder", "webdataset", "cifar-binary", "svhn-mat", "tinyimages-bin"]
SplitName = Literal["labelled", "validation", "unlabelled", "test"]
SPLITS: tuple[SplitName, ...] = ("labelled", "validation", "unlabelled", "test")
Count = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Md5 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Url = Annotated[str, Field(pattern="^https?://")]


class Archive(_Section):
    """A download that holds several files; it is unpacked into the data folder and not kept."""

    url: Url
    bytes: Count | None = None
    sha256: Sha256 | None = None
    md5: Md5 | None = None


class FileSpec(_Section):
    """One file, or the files that a glob matches, and the reader that understands them."""

    path: str | None = None
    """Relative to the data folder."""
    glob: str | None = None
    """Relative to the data folder; the shards are the matches in the order of their paths."""
    reader: Reader
    image: str = "image"
    """Parquet: the column of images, binary or struct<bytes, path>."""
    label: str = "label"
    """Parquet: the column of labels, integers or class names."""
    shuffle: int | None = None
    """Folder: seed of an order at random, so that `first` and `last` are draws from all classes."""
    url: Url | None = None
    """Where `mpl data fetch` gets the file at `path`."""
    archive: str | None = None
    """Or the entry of `archives` that holds it."""
    obtain: str = ""
    """What a person is to do where the file cannot be downloaded by a program."""
    bytes: Count | None = None
    sha256: Sha256 | None = None
    md5: Md5 | None = None
    rows: Count | None = None

    @field_validator("path", "glob")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise ValueError(f"{value!r} leaves the data folder; paths are relative to it")
        if value is not None and (not PurePosixPath(value).parts or "\0" in value):
            raise ValueError(f"{value!r} names no file")
        return value

    @field_validator("glob")
    @classmethod
    def _stars_stand_alone(cls, value: str | None) -> str | None:
        if value is not None and any("**" in part and part != "**" for part in PurePosixPath(value).parts):
            raise ValueError(f"{value!r}: `**`, any folders, stands between slashes, as in `pool/**/*.tar`")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.glob is None):
            raise ValueError("give either `path` or `glob`")
        if self.url is not None and (self.path is None or self.archive is not None):
            raise ValueError("`url` is of one file: give its `path`, and no `archive`")
        return self


class SplitSpec(_Section):
    """A run of rows of one entry of `files`: first the drops, then the first or the last so many; then further runs."""

    source: str = Field(alias="from")
    first: Count | None = None
    last: Count | None = None
    drop_first: Count = 0
    drop_last: Count = 0
    draw: Count | None = None
    """Labelled: so many of these rows, drawn from a run's seed, stratified by class; `data.labelled` goes before."""
    without: Literal["labelled"] | None = None
    """Pool: but for the rows that are labelled, which `draw` or a recipe's `data.labelled` chooses."""
    also: tuple["SplitSpec", ...] = ()
    """Further runs of rows, from other files, that follow these."""

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.first is not None and self.last is not None:
            raise ValueError("give either `first` or `last`")
        return self

    @model_validator(mode="after")
    def _flat(self) -> Self:
        if any(spec.also or spec.without or spec.draw for spec in self.also):
            raise ValueError("`also` has plain runs of rows: no `also`, no `without`, no `draw`")
        if len({spec.source for spec in self.runs}) < len(self.runs):
            raise ValueError("`also` names files that the split has already; one run of rows of each")
        return self

    @property
    def runs(self) -> tuple["SplitSpec", ...]:
        """This run of rows, and those that follow."""
        return (self, *self.also)

    @property
    def counts_from_the_end(self) -> bool:
        """Whether the rows depend on how many there are."""
        return self.last is not None or self.drop_last > 0

    def rows(self, total: int) -> range:
        """The rows of this split in a source of `total` rows; never more than there are."""
        start = min(self.drop_first, total)
        stop = max(start, total - self.drop_last)
        if self.first is not None:
            stop = min(stop, start + self.first)
        if self.last is not None:
            start = max(start, stop - self.last)
        return range(start, stop)


class ImageSpec(_Section):
    """The images as they are stored."""

    size: Annotated[int, Field(ge=1)]
    """Shorter side in pixels."""
    channels: Literal[1, 3] = 3


def require_plain_name(name: str) -> None:
    """Refuse what cannot be part of a path: of a folder, a receipt, a run.

    Raises:
        ValueError: says what is expected.
    """
    if not name.isprintable() or set(name) & set("/\\") or name.strip() in ("", ".", ".."):
        raise ValueError(f"{name!r} must be a plain name, without slashes: it becomes part of a path")


class Manifest(_Section):
    """A data set. `folder` is where the manifest was found, if that was on disk; it is not in the file."""

    name: str
    title: str = ""
    homepage: str | None = None
    license: str | None = None
    classes: Annotated[int, Field(ge=2)]
    class_names: tuple[str, ...] = ()
    """In the order of the labels. Empty: the labelled split's files have them."""
    image: ImageSpec
    files: dict[str, FileSpec]
    archives: dict[str, Archive] = {}
    splits: dict[SplitName, SplitSpec]
    paper: dict[str, Any] | None = None
    notes: str = ""
    folder: SkipValidation[Location | None] = Field(default=None, exclude=True)

    @field_validator("name", "files", "archives")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value:
            require_plain_name(name)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"classes is {self.classes}, class_names has {len(self.class_names)} names")
        seen: dict[str, str] = {}
        for class_name in self.class_names:
            if (name := canonical(class_name)) in seen:
                raise ValueError(f"class_names has a name twice: {seen[name]!r} and {class_name!r}")
            seen[name] = class_name
        for split_name, split in self.splits.items():
            for run in split.runs:
                if run.source not in self.files:
                    hint = suggestion(run.source, self.files) or f"there are {', '.join(self.files)}"
                    raise ValueError(f"splits.{split_name}.from is {run.source!r}, which `files` lacks; {hint}")
            if split.draw is not None and (split_name != "labelled" or split.draw < self.classes):
                raise ValueError(
                    f"splits.{split_name}.draw is {split.draw}: it is for the labelled split, at least one image of "
                    f"each of {self.classes} classes"
                )
            if split.without and (split_name != "unlabelled" or split.source != self._source_of_labels()):
                raise ValueError(
                    f"splits.{split_name}.without: it is for the unlabelled split, of the files that `labelled` is from"
                )
        for entry, file in self.files.items():
            if file.archive is not None and file.archive not in self.archives:
                raise ValueError(f"files.{entry}.archive is {file.archive!r}, which `archives` lacks")
        return self

    def _source_of_labels(self) -> str | None:
        return self.splits["labelled"].source if "labelled" in self.splits else None


def load_manifest(name_or_file: str | Path, data: Location | None = None) -> Manifest:
    """Find and check a manifest.

    Looks for, in this order: a YAML file of that path; `<data>/<name>.yaml`; `<data>/manifest.yaml`
    if it has that name; the embedded manifests; a folder of that path with a manifest.yaml.

    Raises:
        DataError: there is none, or it has an unknown key, a wrong type or an impossible value.
    """
    given = Path(name_or_file)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise DataError(f"{given}: there is no such manifest")
        return _read(given)
    name = str(name_or_file)
    if data is not None and (path := data / f"{name}.yaml").is_file():
        return _read(path)
    manifests = {manifest.name: manifest for manifest in _own(data) or _embedded_as(name)}
    if name not in manifests:
        manifests = {manifest.name: manifest for manifest in reversed(list_manifests(data))}
    if name not in manifests and (given / "manifest.yaml").is_file():
        return _read(given / "manifest.yaml")
    if name not in manifests:
        hint = suggestion(name, manifests)
        raise DataError(
            f"there is no data set {name!r}{'; ' + hint if hint else ''}. "
            f"There are {', '.join(sorted(manifests))}; one of your own is given by the path of "
            "its YAML file, or made with `mpl data import`"
        )
    return manifests[name]


def list_manifests(data: Location | None = None) -> list[Manifest]:
    """The data folder's own manifest, if it has one, then the embedded ones by name."""
    return _own(data) + list(_embedded())


def suggestion(word: str, known: Any) -> str:
    """`did you mean …?` for a misspelt word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def own_manifest(data: Location) -> Manifest | None:
    """The data folder's own manifest, `manifest.yaml` in it, if it has one.

    Raises:
        DataError: it is malformed.
    """
    path = data / "manifest.yaml"
    return _read(path) if path.is_file() else None


def _own(data: Location | None) -> list[Manifest]:
    manifest = None if data is None else own_manifest(data)
    return [] if manifest is None else [manifest]


def _embedded_as(name: str) -> list[Manifest]:
    """The embedded file of that name, so that the others need not be parsed."""
    for entry in resources.files("data_manifests").iterdir():
        if entry.name == f"{name}.yaml":
            return [_parse(entry.read_text(encoding="utf-8"), entry.name, None)]
    return []


def _embedded() -> Iterator[Manifest]:
    folder = resources.files("data_manifests")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            yield _parse(entry.read_text(encoding="utf-8"), entry.name, None)


def _read(path: Location) -> Manifest:
    try:
        with opened(path) as file:
            text = file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"manifest {path} cannot be read: {error}") from error
    return _parse(text, str(path), path.parent)


def _parse(text: str, where: str, folder: Location | None) -> Manifest:
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise DataError(f"manifest {where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"manifest {where} must be a mapping with name, classes, image, files and splits")
    if "folder" in values:
        raise DataError(f"manifest {where}: folder is not a key; files are relative to --data")
    try:
        return Manifest.model_validate({**values, "folder": folder})
    except ValidationError as error:
        raise DataError("\n".join(_explain(where, error))) from error


def _explain(where: str, error: ValidationError) -> Iterator[str]:
    """A line for each mistake: file, key, what is wrong, and the key that was probably meant."""
    models = (FileSpec, SplitSpec, ImageSpec, Archive, Manifest)
    keys = {"from", *SPLITS, *(key for model in models for key in model.model_fields)}
    for item in error.errors():
        path = [str(step) for step in item["loc"] if step != "[key]"]
        wrong_key = item["type"] == "extra_forbidden" or "[key]" in item["loc"]
        if wrong_key:
            hint = suggestion(path[-1], keys - {path[-1]})
            text = f"{'.'.join(path)} is not a key{'; ' + hint if hint else ''}"
        else:
            text = f"{'.'.join(path)}{': ' if path else ''}{item['msg'].removeprefix('Value error, ')}"
        yield f"manifest {where}: {text}"
