"""An experiment's report: STEM.md, .csv, .json and .png, written in one way for all experiments."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.files import write_json, write_text


@dataclass(frozen=True)
class About:
    """What a report says beside its figures.

    Attributes:
        stem: of the files.
        title: heading.
        command: that makes it.
        notes: paragraphs on what was done.
        extra: further figures, for the JSON.
    """

    stem: str
    title: str
    command: str
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report(ABC):
    """Tables, figure and sentences; what differs between experiments is below."""

    about: About

    @property
    @abstractmethod
    def seeds(self) -> Sequence[int]:
        """In the order of all results."""

    @abstractmethod
    def sections(self) -> Iterable[str]:
        """Paragraphs and tables of the Markdown, notes among them, below the heading."""

    @abstractmethod
    def lines(self) -> Iterable[dict[str, Any]]:
        """Lines of the CSV, column → value."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """Of the JSON, beside what all experiments have."""

    @abstractmethod
    def draw(self, path: Path) -> None:
        """Write the figure as PNG."""

    def write(self, folder: Path) -> None:
        """Write all four files."""
        stem = self.about.stem
        write_text(folder / f"{stem}.md", self.markdown())
        write_text(folder / f"{stem}.csv", self.csv())
        write_json(folder / f"{stem}.json", self.as_json())
        self.draw(folder / f"{stem}.png")

    def figure(self, description: str) -> str:
        """The paragraph that shows the figure."""
        return f"![{description}]({self.about.stem}.png)"

    def markdown(self) -> str:
        """For people."""
        paragraphs = [f"# {self.about.title}", *self.sections(), f"Made by `{self.about.command}`."]
        return "\n\n".join(paragraphs) + "\n"

    def csv(self) -> str:
        """For spreadsheets."""
        lines = list(self.lines())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        about = self.about
        head = {"format": 1, "title": about.title, "command": about.command, "seeds": list(self.seeds)}
        return head | self.values() | {"notes": about.notes} | about.extra
