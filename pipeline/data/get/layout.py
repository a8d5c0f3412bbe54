"""What the folders of a person's images mean: splits as torchvision's ImageFolder has them, classes, the pool."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.data.manifest import SplitName
from pipeline.errors import DataError

POOL_FOLDERS = ("unlabelled", "unlabeled")
SPLIT_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training", "trn", "labelled", "labeled"), "labelled"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(POOL_FOLDERS, "unlabelled"),
}
"""Lower-case names of folders, and values of a table's column, that say to which split an image belongs."""


@dataclass(frozen=True)
class Place:
    """Where an image belongs by its path. `split` None: to be divided; `class_name` empty: in no class folder."""

    split: SplitName | None
    class_name: str


@dataclass(frozen=True)
class Layout:
    """How to read the paths of one source: `above` folders that hold everything, then splits or classes.

    Attributes:
        above: folders to pass over.
        splits: the level of the folders of splits, 0 above the classes' or 1 below them; None: there are none.
    """

    above: int = 0
    splits: int | None = None

    def place(self, path: str) -> Place:
        """Of an image, from its path relative to the source."""
        folders = list(PurePosixPath(path).parts[self.above : -1])
        split = None
        if self.splits is not None and not _is_pool(folders):
            word = folders.pop(self.splits).lower() if len(folders) > self.splits else ""
            if word not in SPLIT_WORDS:
                return Place(None, "")  # beside the folders of the splits
            split = SPLIT_WORDS[word]
        if split == "unlabelled" or _is_pool(folders):
            return Place("unlabelled", "")
        return Place(split, folders[0] if folders else "")


def layout_of(paths: Iterable[str], source: str) -> Layout:
    """The layout of a source of labelled images.

    A single folder that holds all others is passed over, as in a tar of a folder. Folders with the names of splits are
    splits: two or more above the classes, or alone below every one of them.

    Raises:
        DataError: a folder may be a split or a class, or either of two levels may be the classes'.
    """
    trees = [PurePosixPath(path).parts[:-1] for path in paths]
    above = _above(trees)
    trees = [folders[above:] for folders in trees]
    below: defaultdict[str, set[str]] = defaultdict(set)
    for folders in trees:
        if folders and not _is_pool(folders):
            below[folders[0]].update(folders[1:2])
    named = [name for name in below if name.lower() in SPLIT_WORDS]
    others = [name for name in below if name.lower() not in SPLIT_WORDS]
    if named and any(below[name] for name in named) and not (len(named) == 1 and others):
        return Layout(above, splits=0)
    if len(named) > 1:
        raise DataError(
            f"{source}: {' and '.join(sorted(named))} look like splits, but hold no folder for each class. Put the "
            "images of each class into a folder of its name, give a table of file and label instead, or rename the "
            "folders if they are classes"
        )
    if named and below[named[0]]:
        raise DataError(
            f"{source}: {named[0]!r} looks like a split, with folders in it ({_some(below[named[0]])}), but beside it "
            f"are folders that do not ({_some(others)}). Import {named[0]} alone, or rename it if it is a class"
        )
    if len(below) > 1 and all(names and _are_splits(names) for names in below.values()):
        return Layout(above, splits=1)
    for level in (1, 2):
        if len(shared := _shared(trees, level)) > 1:
            raise DataError(
                f"{source}: each of {_some(below)} holds folders {_some(shared)}; which are the classes? Say "
                f"--class-level {above + 1} for {_some(below)}, or {above + level + 1} for {_some(shared)}"
            )
    return Layout(above)


def _is_pool(folders: Sequence[str]) -> bool:
    return bool(folders) and folders[0].lower() in POOL_FOLDERS


def _are_splits(names: Iterable[str]) -> bool:
    return all(name.lower() in SPLIT_WORDS for name in names)


def _above(trees: list[tuple[str, ...]]) -> int:
    """Folders that hold all others, one in the other, up to where there are two; splits are none of them."""
    for level in range(max(map(len, trees), default=0)):
        names = {folders[level] for folders in trees if len(folders) > level}
        if len(names) > 1 or _are_splits(names):
            return level
    return 0


def _shared(trees: list[tuple[str, ...]], level: int) -> set[str]:
    """Names of folders that every top folder, the pool's aside, has so many levels below it."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for folders in trees:
        if folders and not _is_pool(folders):
            names[folders[0]].update(folders[level : level + 1])
    return set.intersection(*names.values()) if len(names) > 1 else set()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
