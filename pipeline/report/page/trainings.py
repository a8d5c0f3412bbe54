"""What training and evaluation left: curves from metrics.csv, figures from the records and evaluation*.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RunError
from pipeline.report.page.charts import Chart, step_chart
from pipeline.storage.files import read_json
from pipeline.storage.metrics import read_metrics
from pipeline.storage.runs import Run

PANELS = {  # title: columns of metrics.csv with the names of their lines
    "loss, nats": {"loss": "student", "feedback_loss": "feedback", "supervised_loss": "supervised"},
    "validation top-1, %": {"validation_top1": "validation"},
    "labels changed, share": {"labels_changed": "changed"},
}
CLASSES_SHOWN = 50  # in a list of accuracies: of more, those that are lowest


@dataclass(frozen=True)
class Training:
    """One network's training.

    Attributes:
        folder: of the network.
        charts: a panel each; lines are named.
        facts: (name, text).
    """

    folder: str
    charts: tuple[Chart, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Judged:
    """One evaluation*.json: the network's folder, figures, and accuracy (percent) of classes, lowest first if cut."""

    name: str
    split: str
    images: int
    top1: float
    top5: float
    nll: float
    ece: float
    per_class: tuple[tuple[str, float], ...]
    cut: bool


def trainings(run: Run) -> list[Training]:
    """Every folder of the run with a metrics.csv, the teacher first."""
    folders = sorted((path.parent.name for path in run.root.glob("*/metrics.csv")), key=lambda f: (f != "teacher", f))
    return [_training(run, folder) for folder in folders]


def evaluations(run: Run) -> tuple[list[Judged], list[str]]:
    """Every evaluation*.json that can be read, and a note for each that cannot."""
    judged, notes = [], []
    for path in sorted(run.root.glob("evaluation*.json")):
        try:
            judged.append(_judged(read_json(path)))
        except (RunError, KeyError, TypeError, ValueError) as error:
            notes.append(f"{path.name} is left out: {error}")
    return judged, notes


def record_names(folder: str) -> list[str]:
    """The stages that may have made a network's folder, the most likely first."""
    if folder == "teacher":
        return ["pretrain"]
    name, tuned = folder.removesuffix("-finetuned"), folder.endswith("-finetuned")
    suffix = name.removeprefix("student")
    return [f"finetune{suffix}"] if tuned else [f"train-reduced{suffix}", f"train-mpl{suffix}"]


def _training(run: Run, folder: str) -> Training:
    rows = read_metrics(run.root / folder / "metrics.csv")
    charts = []
    for title, columns in PANELS.items():
        series = {name: _series(rows, column) for column, name in columns.items()}
        series = {name: pair for name, pair in series.items() if pair[0]}
        if any(len(steps) > 1 for steps, _ in series.values()):  # a single point is no curve; the facts state it
            charts.append(step_chart(title, series))
    record = next((found for name in record_names(folder) if (found := run.record(name)) is not None), None)
    return Training(folder, tuple(charts), tuple(_facts(record, rows)))


def _series(rows: Sequence[dict[str, str]], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have one."""
    pairs = []
    for row in rows:
        try:
            pairs.append((float(row["step"]), float(row[column])))
        except (KeyError, TypeError, ValueError):
            continue
    return [step for step, _ in pairs], [value for _, value in pairs]


def _facts(record: dict[str, Any] | None, rows: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    if record is None:
        return [("state", f"unfinished, at step {rows[-1]['step']}" if rows else "unfinished")]
    result, settings = record["result"], record.get("basis", {}).get("settings", {})
    facts = [("method", result["method"])] if "method" in result else []
    if model := settings.get("model", {}).get("name"):
        facts.append(("network", model))
    if "steps" in result:
        facts.append(("steps", f"{result['steps']:,} of {result['batch']:,} images"))
    if "labelled_images" in result:
        kinds = {"pool": result.get("pool_images", 0), "labelled": result["labelled_images"]}
        facts.append(("images", ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)))
        counts = {name: n for name, n in result.get("batch_of", {}).items() if n}
        facts.append(("in a batch", ", ".join(f"{n} {name}" for name, n in counts.items())))
    if validation := result.get("validation"):
        facts.append(("validation", f"top-1 {validation['top1']:.2f}%, NLL {validation['nll']:.3f}"))
    if (calibrator := settings.get("calibrator")) and result.get("method") == "Reduced MPL":
        facts.append(("calibrator", _flat(calibrator, ("kind", "layers", "hidden", "lr"))))
    facts.append(("time", f"{record['seconds']:,.0f} s"))
    if memory := result.get("train_peak_memory_mib"):
        facts.append(("peak memory", f"{memory:,.0f} MiB"))
    return [(name, text) for name, text in facts if text]


def _flat(settings: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {json.dumps(settings[name])}".replace('"', "") for name in names if name in settings)


def _judged(content: dict[str, Any]) -> Judged:
    classes = [(str(name), float(value)) for name, value in content["per_class"].items() if value is not None]
    cut = len(classes) > CLASSES_SHOWN
    if cut:
        classes = sorted(classes, key=lambda pair: pair[1])[: CLASSES_SHOWN // 2]
    return Judged(
        name=str(content["network"]).rstrip("/").rsplit("/", 1)[-1],
        split=str(content["split"]),
        images=int(content["images"]),
        top1=float(content["top1"]),
        top5=float(content["top5"]),
        nll=float(content["nll"]),
        ece=float(content["ece"]),
        per_class=tuple(classes),
        cut=cut,
    )
