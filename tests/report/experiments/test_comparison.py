"""The page of methods side by side says what the results say."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.report.experiments.comparison import Comparison
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from tests.report.experiments.made import results

TOP1 = {"a": [90.0, 92, 91], "b": [93.0, 94.5, 95]}


def made(paper: dict[str, str]) -> Comparison:
    found = results(TOP1, labels={"a": "Method A", "b": "Method B"})
    about = About("table", "A table", "mpl x", ["A note."], {"more": [1]})
    return Comparison(about, found, (Contrast("B − A", "b", "a"),), paper)


def test_rows_and_differences() -> None:
    """Oracle: NumPy's mean and deviation, SciPy's paired t-test."""
    report = made({"a": "–", "b": "97.1 ± 0.2"})
    page = report.markdown()
    b, difference = np.array(TOP1["b"]), np.subtract(TOP1["b"], TOP1["a"])
    assert (
        f"| Method B | {b.mean():.2f} ± {b.std(ddof=1):.2f} | 1.000 ± 0.000 | 1.00 ± 0.00 | 1 | 1 | 97.1 ± 0.2 |"
        in page
    )
    oracle = stats.ttest_rel(TOP1["b"], TOP1["a"])
    found = report.as_json()["differences"]["B − A"]
    low, high = oracle.confidence_interval(0.95)
    assert (found["low"], found["high"], found["p"]) == pytest.approx((low, high, oracle.pvalue))
    assert f"**B − A**: {difference.mean():+.2f}, 95% interval [{low:+.2f}, {high:+.2f}]" in page
    assert page.startswith("# A table\n\n|  | top-1, % |")
    assert page.endswith("A note.\n\n![top-1 by method and seed](table.png)\n\nMade by `mpl x`.\n")


def test_before_and_after_finetuning() -> None:
    """A column more, and both differences; oracle: SciPy's paired t-test."""
    before = {"a": [80.0, 83, 81], "b": [90.0, 90, 92]}
    report = Comparison(About("t", "T", "mpl x", [], {}), results(TOP1, before), (Contrast("B − A", "b", "a"),))
    page, (low, high) = report.markdown(), stats.ttest_rel(before["b"], before["a"]).confidence_interval(0.95)
    assert "| top-1, % | before finetuning |" in page
    assert f"Before finetuning: +9.33, 95% interval [{low:+.2f}, {high:+.2f}]" in page
    found = report.as_json()["differences"]["B − A"]["before_finetuning"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert [row["trained_top1"] for row in report.lines()] == [*before["a"], *before["b"]]
    assert "finetuning" not in made({}).markdown()


def test_without_the_papers_figures_there_is_no_column() -> None:
    page = made({}).markdown()
    assert page.splitlines()[2].endswith("| peak memory, MiB |")
    assert made({}).as_json()["methods"]["Method A"]["paper"] == ""


def test_all_files_say_the_same(tmp_path: Path) -> None:
    report = made({})
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.json", "table.md", "table.png"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [(row["method"], row["seed"], float(row["top1"])) for row in rows] == [
        (label, str(seed), top1)
        for label, values in (("Method A", TOP1["a"]), ("Method B", TOP1["b"]))
        for seed, top1 in enumerate(values)
    ]
    tree = report.as_json()
    assert (tree["format"], tree["seeds"], tree["notes"], tree["more"]) == (1, [0, 1, 2], ["A note."], [1])
