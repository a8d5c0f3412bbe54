"""Which of a teacher's classes is which of the data set's: by equal names, or as a file says."""

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import SHOWN, canonical, is_number
from pipeline.errors import DataError
from pipeline.storage.files import read_at_most
from pipeline.yaml_text import parse_yaml

MOST_BYTES = 64 << 20  # of a file
UNMAPPED = -1  # a teacher's class that is none of the data set's
ClassMap = NDArray[np.int64]
"""For each of the teacher's C_T classes the data set's, from 0, or UNMAPPED; (C_T,)."""


def equal_names(theirs: Sequence[str], ours: Sequence[str]) -> ClassMap:
    """The map of classes that have one name; the others are unmapped."""
    places = {canonical(name): place for place, name in enumerate(ours)}
    return np.array([places.get(canonical(name), UNMAPPED) for name in theirs], np.int64)


def read_class_map(path: Path, theirs: Sequence[str], ours: Sequence[str]) -> ClassMap:
    """The map that a file of YAML or JSON states: for each class of ours one of theirs, or a list of them.

        cat: [tabby, tiger cat, Persian cat]
        dog: beagle
        bird: [7-24, 80]

    A number that is no name is a place in the teacher's list, from 0; `7-24` are the places 7 to 24.

    Raises:
        DataError: it cannot be read; it names a class that there is not; one of theirs stands under two of ours; one of
            ours has none.
    """
    try:
        stated = parse_yaml(_text(path), as_texts=True)
    except (OSError, ValueError) as error:
        raise DataError(f"class map {path} cannot be read: {error}") from error
    if not isinstance(stated, dict):
        raise DataError(f"class map {path} must have a line for each of your classes, as in `cat: [tabby, tiger cat]`")
    return class_map({str(name): _listed(value) for name, value in stated.items()}, theirs, ours, f"class map {path}")


def class_map(stated: Mapping[str, Sequence[str]], theirs: Sequence[str], ours: Sequence[str], where: str) -> ClassMap:
    """The map from ours to lists of theirs, checked; see `read_class_map`."""
    places = {canonical(name): place for place, name in enumerate(ours)}
    known = {canonical(name): place for place, name in enumerate(theirs)}
    _require_known([name for name in stated if canonical(name) not in places], "your classes", ours, where)
    stated = {name: [one for text in names for one in _spelled(text, theirs, known)] for name, names in stated.items()}
    named = [name for names in stated.values() for name in names]
    _require_known([name for name in named if canonical(name) not in known], "the teacher's classes", theirs, where)
    result = np.full(len(theirs), UNMAPPED, np.int64)
    for name, names in stated.items():
        for other in names:
            place = known[canonical(other)]
            if result[place] not in (UNMAPPED, places[canonical(name)]):
                raise DataError(
                    f"{where}: {other!r} stands under {ours[result[place]]!r} and under {name!r}; choose one"
                )
            result[place] = places[canonical(name)]
    if empty := [name for place, name in enumerate(ours) if place not in result]:
        raise DataError(
            f"{where} names none of the teacher's classes for {', '.join(empty[:SHOWN])}: no image would ever be taken "
            "for it. Name one, or leave the map out and let a correction be fitted: --correction fit"
        )
    return result


def _text(path: Path) -> str:
    """Of a file; or of an embedded map of that name."""
    embedded = importlib.resources.files("pipeline.correction") / "maps" / f"{path}.yaml"
    if not path.exists() and path.name == str(path) and embedded.is_file():
        return embedded.read_text(encoding="utf-8")
    return read_at_most(path, MOST_BYTES).decode("utf-8-sig")


def _spelled(text: str, theirs: Sequence[str], known: Mapping[str, int]) -> Sequence[str]:
    """The classes that an entry stands for: itself, or those at a place or a range of places."""
    first, _, last = text.partition("-")
    if canonical(text) in known or not is_number(first.strip()) or (last and not is_number(last.strip())):
        return [text]
    begin, end = int(first), int(last or first)
    return theirs[begin : end + 1] if begin <= end < len(theirs) else [text]


def _require_known(unknown: Sequence[str], what: str, known: Sequence[str], where: str) -> None:
    if unknown:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        shown = ", ".join(known[:SHOWN]) + (", …" if len(known) > SHOWN else "")
        raise DataError(f"{where}: {unknown[0]!r}{more} is none of {what}, which are {shown}")


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [str(name) for name in values]


def class_map_of(path: Path | None, theirs: Sequence[str], ours: Sequence[str], *, complete: bool) -> ClassMap | None:
    """The map of a file, or without one of equal names; None where these leave one of ours without any.

    Args:
        path: of the file.
        theirs, ours: names.
        complete: whether that is an error.

    Raises:
        DataError: see `read_class_map`; or equal names are too few.
    """
    if path is not None:
        return read_class_map(path, theirs, ours)
    found = equal_names(theirs, ours)
    missing = [name for place, name in enumerate(ours) if place not in found]
    if not missing:
        return found
    if complete:
        raise DataError(
            f"none of the teacher's {len(theirs):,} classes is called {', '.join(missing[:SHOWN])}: say which are "
            "yours in a file, --class-map FILE, or let a correction be fitted: --correction fit"
        )
    return None
