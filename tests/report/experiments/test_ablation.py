"""Differences of an ablation's groups are judged together."""

import pytest
from scipy import stats

from pipeline.report.experiments.ablation import Ablation, Group
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from tests.report.experiments.made import results


def test_all_tested_differences_are_judged_together() -> None:
    """Oracle: scipy's paired t-tests, Holm by hand over both groups."""
    off, on, flipped, reduced = [80.0, 82, 84, 81], [85.0, 86.5, 88, 86], [70.0, 75, 74, 70], [80.5, 81, 84.5, 80.8]
    first = results(
        {"on": on, "off": off, "flipped": flipped, "other": reduced},
        {"on": [x - 1 for x in on], "off": [x - 0.5 for x in off]},
    )
    contrasts = (
        Contrast("on", "on", "off", tested=True),
        Contrast("flipped", "flipped", "off", tested=True),
        Contrast("other", "other", "off"),
    )
    groups = (
        Group("A", first, contrasts),
        Group("B", results({"on": reduced, "off": off}), (Contrast("on", "on", "off", tested=True),)),
    )
    ablation = Ablation(About("t", "T", "c"), groups)
    tested = {"on": on, "flipped": flipped, "reduced": reduced}
    p = {name: stats.ttest_rel(values, off).pvalue for name, values in tested.items()}
    least, middle = sorted((p["on"], p["flipped"]))
    expected = {least: 3 * least, middle: max(3 * least, 2 * middle)}
    found = ablation.adjusted()
    assert found == pytest.approx(
        {("A", "on"): expected[p["on"]], ("A", "flipped"): expected[p["flipped"]], ("B", "on"): p["reduced"]}
    )
    assert "Before finetuning: +4.12" in ablation.answers()[0]
    assert "Before finetuning" not in ablation.answers()[1]
    told = ablation.as_json()["groups"][0]["differences"]
    assert told["on"]["mean"] == pytest.approx(4.625)
    assert told["on"]["holm"] == found["A", "on"]
    assert told["other"]["holm"] is None
    assert "| off | 81.75 ± 1.71 | reference |" in ablation.markdown()
