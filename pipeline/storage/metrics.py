"""Metrics of a training run: metrics.csv and TensorBoard event files that survive being killed."""

import csv
import io
from pathlib import Path
from types import TracebackType

from pipeline.storage.files import write_text


class MetricsLog:
    """Appends rows by step; rows after `step`, left by a run that was killed, are dropped first.

    Columns are what the rows hold, in the order in which they first occur; a name that is new widens the table.

    Args:
        folder: gets metrics.csv and tensorboard/.
        step: the step that training goes on from; 0 starts anew.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        self.path = folder / "metrics.csv"
        self.columns = column_names(self.path) if step else ["step"]
        self._rewrite([row for row in read_metrics(self.path) if int(row["step"]) <= step])
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; a column without a value stays empty."""
        new = [name for name in values if name not in self.columns]
        if new:
            self._file.close()
            self.columns += new
            self._rewrite(read_metrics(self.path))
        self._csv.writerow({name: f"{value:.6g}" for name, value in values.items()} | {"step": step})
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """The table of these rows, whole or not at all; then open it to append."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def column_names(path: Path) -> list[str]:
    """The header of a metrics.csv; `step` alone where there is none."""
    if not path.exists():
        return ["step"]
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), ["step"])


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Whole rows of a metrics.csv, oldest first; a last row that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if row.get("step", "").isdigit()]
