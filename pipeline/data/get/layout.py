"""What the folders of a person's images mean: splits as torchvision's ImageFolder has them, classes, the pool."""

from collections import defaultdict
from collections.abc import Iterable
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
    """How to read the paths of one source: `above` folders that hold everything, then splits (or not), then classes."""

    above: int
    splits: bool

    def place(self, path: str) -> Place:
        """Of an image, from its path relative to the source."""
        folders = PurePosixPath(path).parts[self.above : -1]
        split = SPLIT_WORDS.get(folders[0].lower()) if self.splits and folders else None
        if split is not None:
            folders = folders[1:]
        elif self.splits:
            return Place(None, "")  # beside the folders of the splits
        if split == "unlabelled" or (folders and folders[0].lower() in POOL_FOLDERS):
            return Place("unlabelled", "")
        return Place(split, folders[0] if folders else "")


def layout_of(paths: Iterable[str], source: str) -> Layout:
    """The layout of a source of images.

    A single folder that holds all others is passed over, as in a tar of a folder. Where two folders have the names of
    splits, or one and the pool's, they are splits.

    Raises:
        DataError: a folder may be a split or a class.
    """
    trees = [PurePosixPath(path).parts[:-1] for path in paths]
    above = 0
    while _is_wrapped(trees):
        trees, above = [folders[1:] for folders in trees], above + 1
    below: defaultdict[str, set[str]] = defaultdict(set)
    for folders in trees:
        if folders:
            below[folders[0]].update(folders[1:2])
    named = [name for name in below if name.lower() in SPLIT_WORDS and name.lower() not in POOL_FOLDERS]
    others = [name for name in below if name.lower() not in SPLIT_WORDS]
    if not named or (len(named) == 1 and not below[named[0]]):
        return Layout(above, splits=False)  # one class of that name
    if len(named) == 1 and others:
        raise DataError(
            f"{source}: {named[0]!r} looks like a split, with folders in it ({_some(below[named[0]])}), but beside it "
            f"are folders that do not ({_some(others)}). Import {named[0]} alone, or rename it if it is a class"
        )
    if not any(below[name] for name in named):
        raise DataError(
            f"{source}: {' and '.join(sorted(named))} look like splits, but hold no folder for each class. Put the "
            "images of each class into a folder of its name, give a table of file and label instead, or rename the "
            "folders if they are classes"
        )
    return Layout(above, splits=True)


def _is_wrapped(trees: list[tuple[str, ...]]) -> bool:
    """Whether one folder holds everything, and two or more folders."""
    tops = {folders[0] if folders else "" for folders in trees}
    if len(tops) != 1 or tops.pop().lower() in ("", *SPLIT_WORDS):
        return False
    return len({folders[1] for folders in trees if len(folders) > 1}) > 1


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
