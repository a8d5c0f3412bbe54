"""Curves of metrics.csv over seeds."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RunError
from pipeline.report.experiments.curves import read_curve


def test_curves_have_one_value_for_each_seed_and_look(tmp_path: Path) -> None:
    for seed, add in (("a", 0), ("b", 10)):
        rows = ["step,train_top1,loss", "2,,1", f"4,{50 + add},1", f"8,{60 + add},1", f"12,{70 + add},"]
        (tmp_path / f"{seed}.csv").write_text("\n".join(rows) + "\n")
    curve = read_curve([tmp_path / "a.csv", tmp_path / "b.csv"], "train_top1", "x", "black")
    assert curve.steps.tolist() == [4, 8, 12]
    np.testing.assert_array_equal(curve.values, [[50, 60, 70], [60, 70, 80]])
    assert curve.averages == [60, 70]
    (tmp_path / "c.csv").write_text("step,train_top1\n4,1\n")
    with pytest.raises(RunError, match="different steps"):
        read_curve([tmp_path / "a.csv", tmp_path / "c.csv"], "train_top1", "x", "black")
    with pytest.raises(RunError, match=r"a\.csv has no teacher_train_top1"):
        read_curve([tmp_path / "a.csv"], "teacher_train_top1", "x", "black")
