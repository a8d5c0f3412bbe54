"""`mpl calibrate`: the teacher before and after a correction, on validation images."""

from typing import Any

import click
import numpy as np
import torch

from pipeline.correction import Correction
from pipeline.correction.judge import Answered, Candidate, candidates, confusions, movements, reliability
from pipeline.data.manifest import SplitName
from pipeline.errors import UsageError
from pipeline.evaluate import evaluate_logits, interval
from pipeline.report.movements import ROWS, draw_movements
from pipeline.report.reliability import draw_reliability
from pipeline.storage.files import write_json
from stages.execution import Stage, execute
from stages.options import Context, stage_options
from stages.precompute import require_fresh_selection, selected_correction
from stages.teachers import Teacher, class_map, class_names, labelled_answers, teacher_of

FILE, FIGURE, MATRIX = "calibration.json", "reliability.png", "movements.png"


@click.command()
@stage_options
@click.option(
    "--seen-labels", is_flag=True, help="The teacher was trained on the labelled images: fit nothing to them."
)
def command(context: Context, seen_labels: bool) -> None:
    """Show what a correction of the teacher is worth, and how many labelled images it takes.

    On the validation images: accuracy, likelihood and calibration of the teacher, of a map of classes, and of fits to a
    quarter, a half and all of the labelled images; which classes it confuses; and which answers become which classes.

    Reads: the teacher, or its predictions, and mpl filter's correction. Writes: calibrate/calibration.json,
    calibrate/reliability.png, calibrate/movements.png.
    """
    record = execute(context, lambda c: plan(c, seen_labels))
    if "result" in record:
        for line in table(record["result"]):
            context.console.note(line)


def plan(context: Context, seen_labels: bool = False) -> Stage:
    """Plan the stage."""
    if "validation" not in context.data_set.manifest.splits:
        raise UsageError(f"{context.data_set.manifest.name} has no validation split, on which a correction is judged")
    filtered = require_fresh_selection(context.run)
    teacher = teacher_of(context, None, assume_class_order=True, recorded=filtered["result"])
    seen = seen_labels or teacher.saw_the_labelled_images
    basis = {
        "selection": filtered["result"]["fingerprint"],
        "teacher": teacher.basis,
        "labelled": context.data_set.split("labelled").fingerprint(),
        "validation": context.data_set.split("validation").fingerprint(),
        "seen_labels": seen,
        "seed": context.seed,
    }
    folder = context.run / "calibrate"
    return Stage(
        name="calibrate",
        basis=basis,
        outputs=[folder / name for name in (FILE, FIGURE, MATRIX)],
        work=lambda: work(context, teacher, filtered["result"], seen),
        summary=lambda result: f"judged on {result['images']:,} validation images",
        cheap=frozenset(basis),
    )


def work(context: Context, teacher: Teacher, filtered: dict[str, Any], seen: bool) -> dict[str, Any]:
    """Judge all candidates."""
    teacher.begin()
    ours = class_names(context)
    validation = _answered(context, teacher, "validation")
    if seen:
        context.console.note(
            "the teacher was trained on the labelled images: what it says of them is no evidence, and nothing is fitted"
        )
        labelled = Answered(validation.q[:0], validation.labels[:0])
    else:
        labelled = _answered(context, teacher, "labelled")
    selected = selected_correction(context, filtered) or Correction.identity(ours)
    found = candidates(labelled, teacher.names, ours, class_map_or_none(context, teacher), selected, seed=context.seed)
    rows = [_judged(candidate, validation, ours) for candidate in found]
    panels = {row["name"]: row["reliability"] for row in (rows[0], rows[-1])}
    folder = context.run / "calibrate"
    folder.mkdir(parents=True, exist_ok=True)
    draw_reliability(panels, folder / FIGURE)
    moved = movements(validation.q, found[0].correction, found[-1].correction, ROWS)
    draw_movements(
        [(found[0].name, moved.before), (found[-1].name, moved.after)][: len(found)],
        [
            f"{_short(teacher.names[answer])} ({images:,})"
            for answer, images in zip(moved.answers, moved.images, strict=True)
        ],
        ours,
        folder / MATRIX,
    )
    result = {"images": len(validation.labels), "labelled": len(labelled.labels), "candidates": rows,
              "movements": moved.largest(teacher.names, ours)}  # fmt: skip
    write_json(folder / FILE, {"format": 1, **result})
    return result


def class_map_or_none(context: Context, teacher: Teacher) -> Any:
    """The map that the recipe names, or of equal names where they are enough; none for equal classes."""
    return None if teacher.names == class_names(context) else class_map(context, teacher)


def _answered(context: Context, teacher: Teacher, split: SplitName) -> Answered:
    return Answered(*labelled_answers(context, teacher, split))


def _judged(candidate: Candidate, validation: Answered, names: tuple[str, ...]) -> dict[str, Any]:
    """Figures of a candidate, for the record."""
    p = candidate.correction.targets(validation.q)
    labels = validation.labels
    evaluation = evaluate_logits(torch.from_numpy(np.log(np.maximum(p, 1e-12))), torch.from_numpy(labels))
    right = p.argmax(axis=1) == labels
    return {
        "name": candidate.name,
        "kind": candidate.correction.kind,
        "labelled_images": candidate.images,
        "top1": round(evaluation.top1, 2),
        "top1_interval": interval(int(right.sum()), len(labels)),
        "nll": round(evaluation.nll, 4),
        "ece": round(evaluation.ece, 2),
        "confusions": confusions(evaluation.confusion.numpy(), names),
        "reliability": reliability(p.max(axis=1), right),
    }


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def table(result: dict[str, Any]) -> list[str]:
    """The outcome as lines for a person."""
    rows = result["candidates"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'on validation':<{width}}  top-1, %  95% interval   NLL     ECE, %"]
    for row in rows:
        low, high = row["top1_interval"]
        lines.append(
            f"{row['name']:<{width}}  {row['top1']:>8.2f}  {low:>5.1f} to {high:<5.1f} {row['nll']:>6.3f}  "
            f"{row['ece']:>7.2f}"
        )
    for row in (rows[0], rows[-1])[: len(rows)]:
        pairs = ", ".join(f"{c['is']} taken for {c['taken for']} {c['images']:,} times" for c in row["confusions"][:3])
        lines.append(f"{row['name']}: {pairs or 'nothing confused'}")
    moved = [
        f"{_short(m['answer'])} → {m['class']} +{100 * m['share']:.1f}% "
        f"(of {m['images']:,} images {m['before']:.2f}, now {m['after']:.2f})"
        for m in result.get("movements", [])[:5]
    ]
    return [*lines, *([f"largest movements, in shares of all images: {'; '.join(moved)}"] if moved else [])]
