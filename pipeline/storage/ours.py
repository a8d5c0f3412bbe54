"""What is ours in a run or a store, and may be removed: known by its name and what it holds, never by its place alone.

A person may keep files of their own beside ours. They stay, and so do the folders that hold them.
"""

import re
from collections.abc import Callable

from pipeline.storage.files import TEMPORARY, Location, discard, names_in
from pipeline.storage.tables import format_of

NAMES = re.compile(  # of files that have no header
    r"model\.safetensors|(correction|embedding)\.safetensors|config\.json|metrics\.csv|calibrator\.safetensors|calibration\.json|index\.json"
    r"|step-\d+(\.\w+)?|events\.out\.tfevents\..*|copies\.json|_manifest\.json|pool-\d{5,}\.(tar|parquet)"
    r"|labelled-\d+\.parquet|record\.json|started\.json|shard-\d+\.arrow|.+-[0-9a-f]{16}\.(pixels|parquet)"
    r"|evaluation(-.*)?\.json|\.lock"
)
FOLDERS = frozenset({"checkpoints", "tensorboard", "teacher", "spill", "folds"})  # within a folder of ours


def is_ours(place: Location) -> bool:
    """Whether a file was written by this project: by its name, or a Parquet file by its header."""
    name = place.name
    if NAMES.fullmatch(name) or TEMPORARY.fullmatch(name):
        return True
    return name.endswith(".parquet") and format_of(place) is not None


def remove_ours(*places: Location, tell: Callable[[str], None] = lambda text: None) -> None:
    """Remove files, and what is ours in folders; a folder goes when nothing else is left in it.

    Args:
        places: what is not there is no error.
        tell: told what is left alone.
    """
    for place in places:
        if not place.is_dir():
            discard(place)
            continue
        left = _emptied(place)
        if left:
            tell(f"left alone, as not ours: {', '.join(sorted(left)[:3])}{', …' if len(left) > 3 else ''}")


def _emptied(folder: Location) -> list[str]:
    """Remove what is ours in a folder, and it; returns what is left."""
    left: list[str] = []
    for name in names_in(folder):
        place = folder / name
        if place.is_dir():
            left += _emptied(place) if _is_own_folder(name) else [str(place)]
        elif is_ours(place):
            discard(place)
        else:
            left.append(str(place))
    if not left:
        discard(folder)
    return left


def _is_own_folder(name: str) -> bool:
    return (
        name in FOLDERS or re.fullmatch(r"(step|fold)-\d+", name) is not None or TEMPORARY.fullmatch(name) is not None
    )
