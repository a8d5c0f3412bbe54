"""The sweep's statistics against SciPy and brute force, and what its page says."""

import csv
import io
import itertools
import random
import re
from pathlib import Path

import numpy as np
from scipy import stats

from pipeline.report.experiments.axes import Axis, Level
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast
from pipeline.report.experiments.sweep import Sweep
from tests.report.experiments.made import results

METHODS = ("off", "on", "more")
AXES = (
    Axis("Share outside", "outside", (Level("0%", "origin"), Level("30%", "o30"), Level("60%", "o60"))),
    Axis("Wrong labels", "wrong", (Level("0%", "origin"), Level("40%", "n40"))),
)


def made(seeds: int = 5, seed: int = 0) -> Sweep:
    """Results at random; feedback's effect differs from point to point."""
    draw = random.Random(seed)
    effects = {"origin": 0.1, "o30": 2.0, "o60": -2.0, "n40": 5.0}
    points = {
        point: results(
            {method: [90 + effect * (method == "on") + draw.gauss(0, 0.6) for _ in range(seeds)] for method in METHODS}
        )
        for point, effect in effects.items()
    }
    contrasts = (
        Contrast("feedback", "on", "off", tested=True),
        Contrast("nothing", "more", "off", tested=True),
        Contrast("other", "on", "more"),
    )
    reference = results({"supervised": points["origin"].values("off")}, labels={"supervised": "Supervised"})
    return Sweep(About("sweep", "When?", "mpl x", ["A note."]), AXES, points, contrasts, reference)


def test_differences_and_growth_are_paired() -> None:
    sweep = made()
    on, off = (np.array([sweep.results[p].values(m) for p in ("origin", "o60")]) for m in ("on", "off"))
    oracle = stats.ttest_rel(on[1], off[1])
    found = sweep.results["o60"].difference(sweep.contrasts[0])
    low, high = oracle.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high, found.p], [low, high, oracle.pvalue], rtol=1e-9)
    oracle = stats.ttest_1samp((on - off)[1] - (on - off)[0], 0)
    low, high = oracle.confidence_interval(0.95)
    growth = sweep.growth(sweep.contrasts[0], AXES[0])
    np.testing.assert_allclose([growth.low, growth.high, growth.p], [low, high, oracle.pvalue], rtol=1e-9)


def test_holm_is_closed_testing() -> None:
    """Oracle: a hypothesis is rejected if Bonferroni rejects every set of hypotheses that holds it."""
    plain = 0
    for seed in range(12):
        sweep = made(4, seed)
        p = {
            (c.name, point): stats.ttest_rel(of_point.values(c.variant), of_point.values(c.against)).pvalue
            for c in sweep.questions
            for point, of_point in sweep.results.items()
        }
        sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(p, n)]
        rejected = {s for s in sets if min(p[key] for key in s) <= 0.05 / len(s)}
        assert sweep.certain() == {key for key in p if all(s in rejected for s in sets if key in s)}
        plain += sweep.certain() != {key for key in p if p[key] <= 0.05 / len(p)}
    assert plain  # the steps of the procedure mattered somewhere


def test_every_point_is_answered_once_and_on_its_side() -> None:
    sweep = made()
    assert sweep.points == ["origin", "o30", "o60", "n40"]
    places = {"origin": "common origin", "o30": "outside 30%", "o60": "outside 60%", "n40": "wrong 40%"}
    for contrast, answer in zip(sweep.questions, sweep.answers(), strict=True):
        sides = dict(re.findall(r"\*(above zero|below zero|not told from zero):\* ([^;]*?)(?=[;.]$|; \*)", answer))
        for point, place in places.items():
            of_point = sweep.results[point]
            values = np.subtract(of_point.values(contrast.variant), of_point.values(contrast.against))
            low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            side = "above zero" if low > 0 else "below zero" if high < 0 else "not told from zero"
            assert [name for name, text in sides.items() if f"{place} (" in text] == [side]
            mark = "†" * ((contrast.name, point) in sweep.certain())
            assert f"{place} ({values.mean():+.2f}{mark})" in sides[side]


def test_page_has_every_axis_method_and_difference() -> None:
    sweep = made()
    page = sweep.markdown()
    assert page.startswith("# When?\n\n**feedback** (on − off): ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    heads = [row for row in rows if row[-1] == "last − first"]
    assert [row[0] for row in heads] == ["Share outside", "Wrong labels"]
    assert len(rows) == 2 * (2 + 3 + 3)
    differences = [row for row in rows if row[0] == "*on − off*"]
    for row, axis in zip(differences, AXES, strict=True):
        for cell, level in zip(row[1:], axis.levels, strict=False):
            d = sweep.results[level.point].difference(sweep.contrasts[0])
            assert f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" in cell
            assert cell.startswith("**") == (d.low > 0 or d.high < 0)
            assert cell.endswith("†") == (("feedback", level.point) in sweep.certain())
    assert "of 18 about 1 would" in page  # three differences at four points, and along two axes
    assert "of the 8 comparisons" in page
    assert page.rstrip().endswith("Made by `mpl x`.")


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    """Nothing is called different from zero; the figure is drawn all the same."""
    sweep = made(1)
    page = sweep.markdown()
    assert "above zero" not in page
    assert sweep.certain() == set()
    sweep.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.json", "sweep.md", "sweep.png"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_every_run() -> None:
    sweep = made()
    rows = list(csv.DictReader(io.StringIO(sweep.csv())))
    assert len(rows) == 4 * 3 * 5
    for row in rows:
        assert float(row["top1"]) == sweep.results[row["point"]].figures[row["method"]][int(row["seed"])]["top1"]
    found = sweep.as_json()
    assert sweep.certain()
    assert {(d["contrast"], d["point"]) for d in found["differences"] if d.get("p_holm", 1) <= 0.05} == sweep.certain()
    assert len(found["differences"]) == 3 * 4
    assert len(found["growth"]) == 3 * 2
