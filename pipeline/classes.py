"""Class names: compared by name, numbers by value; and what a number in a file means.

A label may come as a class name or as a number. In one data set a number has one meaning: where the names of the
classes are words it is the place of a class, from 0; where a class is named by a number it is that name. Names are
one if they look it: Unicode's composed form, no space around, whole numbers by value (`007` is `7`).
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import DataError

DIGITS = 19
SHOWN = 20  # names in a message


def canonical(name: str) -> str:
    """What is compared of a name."""
    text = unicodedata.normalize("NFC", name).strip()
    return str(int(text)) if is_number(text) else text


def is_number(text: str) -> bool:
    """Whether a name is a whole number; longer ones than 64 bits have are names like others."""
    return text.isdecimal() and len(text) < DIGITS


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted: by value where all are whole numbers, else as text."""
    names = list(names)
    numbers = all(is_number(canonical(name)) for name in names)
    return sorted(names, key=lambda name: (int(canonical(name)) if numbers else 0, canonical(name)))


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists name the same classes, in whatever order."""
    return len(some) == len(others) and {*map(canonical, some)} == {*map(canonical, others)}


def require_distinct(names: Sequence[str], where: str) -> None:
    """Two names that look alike are refused.

    Raises:
        DataError: there are two.
    """
    seen: dict[str, str] = {}
    for name in names:
        if canonical(name) in seen:
            raise DataError(
                f"{where}: two classes have one name, {seen[canonical(name)]!r} and {name!r}; "
                "give them different names, or make them one class"
            )
        seen[canonical(name)] = name


@dataclass(frozen=True)
class ClassNames:
    """The class names of a data set, distinct, in the order of the labels.

    Attributes:
        names: (C,).
        where: the data set, for messages.
    """

    names: tuple[str, ...]
    where: str

    def __post_init__(self) -> None:
        require_distinct(self.names, self.where)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {canonical(name): place for place, name in enumerate(self.names)}

    @cached_property
    def numbers_are_names(self) -> bool:
        """Whether a number names a class, as opposed to being its place."""
        return any(is_number(name) for name in self._places)

    def label(self, text: str) -> int | None:
        """The label that a text stands for: a class name, or else a place; None if it is neither.

        A place need not be one of the C: that is checked with all labels.
        """
        name = canonical(text)
        if (place := self._places.get(name)) is not None:
            return place
        return int(name) if is_number(name) and not self.numbers_are_names else None

    def places(self, stated: Sequence[str], file: str) -> tuple[int, ...]:
        """The label here of each class that a file names, in the order of the file's own labels.

        Raises:
            DataError: the file names a class that is none of these, or one of them twice.
        """
        require_distinct(stated, file)
        if unknown := [name for name in stated if canonical(name) not in self._places]:
            more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            shown = ", ".join(self.names[:SHOWN]) + (", …" if len(self.names) > SHOWN else "")
            raise DataError(
                f"{self.where}: {file} states the class {unknown[0]!r}{more}, which the data set lacks; its classes "
                f"are {shown}. The file's labels would be misread: correct its names, or `class_names` of the manifest"
            )
        return tuple(self._places[canonical(name)] for name in stated)

    def require_one_reading(self, file: str) -> None:
        """For a file with numbers for labels that names no classes.

        Raises:
            DataError: its numbers could be places or names, and these differ.
        """
        in_place = all(canonical(name) == str(place) for place, name in enumerate(self.names))
        if self.numbers_are_names and not in_place:
            raise DataError(
                f"{self.where}: the labels of {file} are numbers and the classes are named by numbers "
                f"({', '.join(self.names[:SHOWN])}): the file does not say whether its numbers are these names or "
                "places from 0. Write its labels as text, which is read as names, or state its class names (ClassLabel)"
            )
