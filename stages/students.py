"""Where students lie, and which stage trained them: student/, or student-NAME/ beside it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.errors import RunError
from pipeline.storage.runs import STARTED_FILE
from stages.execution import Stage
from stages.options import Context

MAKERS = ("train-reduced", "train-mpl")
NAME_HELP = "Keep this student beside others: student-NAME/ instead of student/."
RESERVED = re.compile(r"(.*-)?finetuned|network(-.*)?")  # of student-finetuned/, evaluate-network-…/


class StudentName(click.ParamType):
    """A name that makes folders: checked here, once, where it enters."""

    name = "NAME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if it can be part of a folder's, and no stage has that folder for something else."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            self.fail(f"{value!r} must be of letters, digits, '.', '_' and '-', at most 64, and begin with a letter or "
                      "digit", param, ctx)  # fmt: skip
        if RESERVED.fullmatch(value):
            self.fail(f"{value!r} is taken by a stage of that name; choose another", param, ctx)
        return value


def name_option(help: str) -> Any:
    """--name."""
    return click.option("--name", type=StudentName(), help=help)


def student_folder(context: Context, name: str | None) -> Path:
    """student/, or student-NAME/."""
    return context.run / (f"student-{name}" if name else "student")


def stage_name(stage: str, name: str | None) -> str:
    """Folder of a stage's record."""
    return f"{stage}-{name}" if name else stage


def trained(context: Context, name: str | None) -> dict[str, Any]:
    """Record of the stage that trained the student.

    Raises:
        RunError: there is none; names the commands that make one.
    """
    for maker in MAKERS:
        if (record := context.run.record(stage_name(maker, name))) is not None:
            return record
    named = f" --name {name}" if name else ""
    raise RunError(
        f"{context.run.root} has no trained student{f' {name!r}' if name else ''}. Run first: "
        f"mpl train-reduced --run {context.run.root}{named} (or mpl train-mpl)"
    )


def own_student(context: Context, stage: Stage, maker: str, name: str | None) -> Stage:
    """The stage, which may not overwrite a student that the other method trained, unless told to.

    Raises:
        RunError: with the ways out.
    """
    (other,) = (stage_name(m, name) for m in MAKERS if m != maker)
    folder = context.run / other
    if context.force or (context.run / stage.name / STARTED_FILE).exists():
        return replace(stage, leftovers=[*stage.leftovers, folder])
    if context.run.record(other) is not None or (folder / STARTED_FILE).exists():
        raise RunError(
            f"{student_folder(context, name)} is mpl {other}'s. Give --name to keep both, --force to replace it, "
            "or another --run"
        )
    return stage
