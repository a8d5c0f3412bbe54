"""Differences between a method with MPL on top and alone, against SciPy, and what the page says of them."""

import pytest
from scipy import stats

from pipeline.report.experiments.pairs import Pairs
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from tests.report.experiments.made import results


def test_differences_are_paired_and_adjusted() -> None:
    """Oracle: scipy's paired t-test; Holm by hand."""
    a, b, c = [80.0, 82, 84, 81], [85.0, 86.5, 88, 86], [80.5, 81, 84.5, 80.8]
    found = results(
        {"alone-x": a, "mpl-x": b, "alone-y": a, "mpl-y": c, "alone-z": a},
        {"mpl-x": [x - 4 for x in b], "mpl-y": c},
        {"alone-x": "Better", "mpl-x": "Better + MPL", "alone-y": "Same", "mpl-y": "Same + MPL", "alone-z": "Alone"},
    )
    contrasts = (
        Contrast("Better", "mpl-x", "alone-x", tested=True),
        Contrast("Same", "mpl-y", "alone-y", tested=True),
    )
    paper = {"alone-x": "–", "alone-y": "1 → 2", "alone-z": "–"}
    table = Pairs(About("t", "T", "c"), found, contrasts, {"P": paper})
    p = [stats.ttest_rel(b, a).pvalue, stats.ttest_rel(c, a).pvalue]
    holm = {name: adjusted for name, (_, adjusted) in table.differences().items()}
    assert holm == pytest.approx({"Better": 2 * p[0], "Same": p[1]})
    assert table.answer() == (
        "With MPL on top and finetuned, better: Better (+4.62); undecided: Same (-0.05). "
        "Before finetuning, at equal steps, undecided: Better (+0.62), Same (-0.05)."
    )
    before = stats.ttest_rel([x - 4 for x in b], a)
    assert before.pvalue > 0.05
    interval = before.confidence_interval(0.95)
    adjusted = max(2 * min(before.pvalue, p[1]), before.pvalue)
    told = table.as_json()["methods"]["Better"]["difference_before_finetuning"]
    assert (told["mean"], told["p"], told["holm"]) == pytest.approx((0.625, before.pvalue, adjusted))
    page = table.markdown()
    assert f"| +0.62 [{interval.low:+.2f}, {interval.high:+.2f}], p {adjusted:.3f} | – |" in page
    assert len(table.csv().splitlines()) == 1 + 3 * 4 + 2 * 4
    assert "| Alone | 81.75 ± 1.71 | – | – | – | – | – | – | – |" in page
    assert "| Better + MPL | 82.38 ± 1.25 | 86.38 ± 1.25 |" in page  # before finetuning, after it
    assert "| Better | – | 81.75 ± 1.71 |" in page
