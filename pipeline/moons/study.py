"""Which settings and which methods separate the moons: every row of the table, and how one cell is made."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunError
from pipeline.moons.settings import EVERY, PAPER, PLAIN, WORKING, MethodName, MoonsSettings, VariantName
from pipeline.storage.files import fingerprint, opened, whole_file

GRID = 90  # points of the decision regions' grid on each side
X, Y = (-1.5, 2.5), (-1.0, 1.5)  # what they show
MPL_BOTH: tuple[MethodName, ...] = ("mpl", "mpl_uda")


@dataclass(frozen=True)
class Row:
    """Settings with the methods that are tried on them.

    Attributes:
        name: key.
        label: for people.
        settings: all numbers.
        methods: of this row.
        part: of the table: settings of all networks, or of the feedback alone.
    """

    name: str
    label: str
    settings: MoonsSettings
    methods: tuple[MethodName, ...] = EVERY
    part: str = "networks"


def rows(variant: VariantName | None, changes: dict[str, Any]) -> list[Row]:
    """The paper's settings, what works, or (None) both with all that lies between and what the feedback does.

    Args:
        variant: one of the two alone.
        changes: of settings, in every row.
    """

    def settings(base: MoonsSettings, **others: Any) -> MoonsSettings:
        return MoonsSettings.model_validate(base.model_dump() | others | changes)

    paper = Row("paper", "the paper's: weights in ±0.1, lr 0.1", settings(PAPER))
    working = Row("working", "weights in ±1, lr 1", settings(WORKING))
    if variant is not None:
        return [paper] if variant == "paper" else [working]
    return [
        paper,
        Row("init", "weights in ±1", settings(PAPER, init=1.0), PLAIN),
        Row("lr", "lr 1", settings(PAPER, lr=1.0), PLAIN),
        working,
        Row("off", "no feedback", settings(WORKING, control="off"), MPL_BOTH, "feedback"),
        Row("hard", "hard: sampled labels", settings(WORKING, feedback="hard"), MPL_BOTH, "feedback"),
        Row("flipped", "sign flipped", settings(WORKING, control="flipped"), MPL_BOTH, "feedback"),
        Row("weak", "weight 0.1", settings(WORKING, feedback_weight=0.1), ("mpl_uda",), "feedback"),
        Row("strong", "weight 10", settings(WORKING, feedback_weight=10.0), ("mpl_uda",), "feedback"),
        Row(
            "alone",
            "weight 1, teacher's own labelled loss left out",
            settings(WORKING, supervised_weight=0.0),
            MPL_BOTH,
            "feedback",
        ),
    ]


@dataclass(frozen=True)
class Cell:
    """One method at one row's settings, over draws."""

    row: str
    method: MethodName
    settings: MoonsSettings
    draws: tuple[int, ...]

    @property
    def name(self) -> str:
        """Key of its result."""
        return f"{self.row}/{self.method}"

    @property
    def file(self) -> str:
        """Name of the file that keeps its result; other settings or draws, another name."""
        basis = {"settings": self.settings.model_dump(mode="json"), "draws": list(self.draws)}
        return f"{self.row}-{self.method}-{fingerprint(basis)[:12]}.npz"


@dataclass(frozen=True)
class CellResult:
    """The result of a cell; D draws, L measurements.

    Attributes:
        accuracy, teacher_accuracy: at the end, percent, (D,).
        steps: of the measurements, (L,).
        curve, labelled_loss, cosine_labelled, cosine_true: see `train.Outcome`, (L, D).
        regions: probability of class 1 on the grid, (D, GRID, GRID), float16.
    """

    accuracy: list[float]
    teacher_accuracy: list[float] | None
    steps: list[int]
    curve: NDArray[np.float64]
    labelled_loss: NDArray[np.float64]
    cosine_labelled: NDArray[np.float64]
    cosine_true: NDArray[np.float64]
    regions: NDArray[np.float16]

    def save(self, path: Path) -> None:
        """Keep it, whole or not at all."""
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> "CellResult":
        """What was kept.

        Raises:
            RunError: the file is damaged.
        """
        try:
            with opened(path) as file, np.load(file) as stored:  # pickles are refused by default
                arrays = {name: stored[name] for name in stored.files}
            lists = {name: arrays[name].tolist() for name in ("accuracy", "steps")}
            teacher = arrays["teacher_accuracy"].tolist() if "teacher_accuracy" in arrays else None
            return cls(**(arrays | lists | {"teacher_accuracy": teacher}))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunError(f"{path} is damaged ({error}); remove it and run the same command again") from error

    def successes(self, settings: MoonsSettings) -> list[bool]:
        """Draw by draw."""
        return [value >= 100 * settings.success for value in self.accuracy]


def cells(study: Sequence[Row], draws: Sequence[int]) -> list[Cell]:
    """All of a study, the longest first."""
    every_cell = [Cell(row.name, method, row.settings, tuple(draws)) for row in study for method in row.methods]
    cost: dict[MethodName, int] = {"mpl_uda": 4, "mpl": 3, "uda": 2}
    return sorted(every_cell, key=lambda cell: -cell.settings.steps * cost.get(cell.method, 1))


@dataclass(frozen=True)
class RunCell:
    """Trains and evaluates a cell; work of `pipeline.storage.workers.run_all`. `threads`: of torch; None: as set."""

    threads: int | None = None

    def placed(self, place: int, threads: int) -> "RunCell":
        """In a worker process: matrices of 8 × 8 gain nothing from more than one thread."""
        return RunCell(1)

    def __call__(self, cell: Cell, progress: Callable[[int], None]) -> CellResult:
        import torch

        from pipeline.moons.data import make_moons
        from pipeline.moons.train import regions, train

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        outcome = train(cell.method, cell.settings, make_moons(cell.draws, cell.settings), progress)
        teacher = outcome.teacher_accuracy
        return CellResult(
            accuracy=outcome.accuracy.tolist(),
            teacher_accuracy=None if teacher is None else teacher.tolist(),
            steps=outcome.steps.tolist(),
            curve=outcome.curve,
            labelled_loss=outcome.labelled_loss,
            cosine_labelled=outcome.cosine_labelled,
            cosine_true=outcome.cosine_true,
            regions=regions(outcome.student, *grid()).astype(np.float16),
        )


def grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates of the decision regions' grid."""
    return np.linspace(*X, GRID), np.linspace(*Y, GRID)
