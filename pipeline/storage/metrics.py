"""Metrics of a training run: metrics.csv and TensorBoard event files that survive being killed."""

import csv
import io
from pathlib import Path
from types import TracebackType

from pipeline.storage.files import write_text

COLUMNS = (
    "step",
    "learning_rate",
    "loss",
    "gradient_norm",
    "feedback_loss",
    "feedback_norm",
    "supervised_loss",
    "labels_changed",
    "h",
    "teacher_loss",
    "teacher_pool_share",
    "train_top1",
    "teacher_train_top1",
    "teacher_validation_top1",
    "validation_top1",
    "validation_nll",
    "images_per_second",
)


class MetricsLog:
    """Appends rows by step; rows after `step`, left by a run that was killed, are dropped first.

    Args:
        folder: gets metrics.csv and tensorboard/.
        step: the step that training goes on from; 0 starts anew.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        self.path = folder / "metrics.csv"
        rows = [row for row in read_metrics(self.path) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; a column without a value stays empty."""
        self._csv.writerow({"step": step} | {name: f"{value:.6g}" for name, value in values.items()})
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Whole rows of a metrics.csv, oldest first; a last row that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if row.get("step", "").isdigit()]
