"""Which teacher: the one given, the recipe's, or the one that scored the pool."""

from pathlib import Path
from typing import Any

from pipeline.storage.workers import EngineSettings
from stages.networks import network_folder
from stages.options import Context
from stages.teachers.network import NetworkTeacher
from stages.teachers.predictions import PredictionsTeacher
from stages.teachers.teacher import Teacher


def teacher_folder(context: Context, teacher: Path | None) -> Path:
    """The network to use: the one given, else the one that this run's pool was scored with, else teacher/."""
    if teacher is not None:
        return teacher.resolve()
    known = context.run.record("filter")
    if known is None and context.recipe.filter.teacher is not None:
        return network_folder(context, Path(context.recipe.filter.teacher))
    return context.run.place("teacher" if known is None else known["result"]["teacher"] or "teacher")


def teacher_of(
    context: Context,
    teacher: Path | None,
    engine: EngineSettings | None = None,
    assume_class_order: bool = False,
    recorded: dict[str, Any] | None = None,
) -> Teacher:
    """The predictions that the recipe names, unless a network is given; else a network.

    `recorded` is what `mpl filter` recorded, for stages after it.
    """
    if teacher is None and recorded is not None and recorded["teacher"] is None:
        return PredictionsTeacher(context, recorded)
    if teacher is None and recorded is None and context.recipe.filter.predictions:
        return PredictionsTeacher(context)
    folder = teacher_folder(context, teacher)
    if folder == (context.run / "teacher").resolve():
        context.run.require("pretrain", "mpl pretrain")
    return NetworkTeacher(context, folder, engine, assume_class_order)
