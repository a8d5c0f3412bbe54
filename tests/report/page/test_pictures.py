"""Pictures of a few rows of shards, and numbers for people."""

import base64
import io
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pipeline.data.readers.shard import Chosen, Sample, Shard, Window
from pipeline.errors import DataError
from pipeline.report.page.charts import nice_ticks, percent, step_chart
from pipeline.report.page.pictures import data_uri, picture, take_pictures
from pipeline.report.page.render import shown


class Memory(Shard):
    """A shard in memory that remembers what was read; row 13 cannot be read."""

    def __init__(self, name: str, rows: int, side: int = 8) -> None:
        self.name, self.count, self.side = name, rows, side
        self.asked: list[tuple[int, int | None]] = []
        self.read_rows: list[int] = []

    def rows(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return self.name

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        self.asked.append((start, stop))
        for row in range(start, self.count if stop is None else stop):
            if row == 13:
                raise DataError("row 13 is damaged")
            self.read_rows.append(row)
            yield Sample(row, f"{self.name}-{row}", encoded(row, self.side))


def encoded(value: int, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256, value // 256 % 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_pictures_are_those_of_their_rows_and_little_else_is_read() -> None:
    shard = Memory("a", 100_000)
    rows = [20, 30, 5_000, 99_999]
    found = take_pictures(
        [(("unlabelled", "a", r), f"a-{r}") for r in rows], lambda _: {"a": shard}, 8, lambda *_: False
    )
    assert not found.notes
    for row in rows:
        expected = np.full((8, 8, 3), (row % 256, row // 256 % 256, 9), np.uint8)
        assert np.array_equal(pixels_of(found.uris["unlabelled", "a", row]), expected)
    assert shard.asked == [(20, 31), (5_000, 5_001), (99_999, 100_000)]


def test_what_is_chosen_of_a_window_of_a_shard_keeps_its_rows() -> None:
    inner = Memory("a", 100)
    window = Chosen(Window(inner, 40, 90), (0, 3, 10, 20))
    found = take_pictures([(("test", "a", 50), None)], lambda _: {"a": window}, 8, lambda *_: False)
    assert inner.read_rows == [50]
    assert pixels_of(found.uris["test", "a", 50])[0, 0].tolist() == [50, 0, 9]


def test_what_cannot_be_had_is_told_and_the_rest_is_there() -> None:
    """A lost split, a lost shard, a changed one, another key, a damaged row; each alone."""
    shards = {name: Memory(name, 40) for name in ("good", "changed", "moved", "damaged")}
    wanted = [
        (("unlabelled", "good", 2), "good-2"),
        (("unlabelled", "changed", 2), "changed-2"),
        (("unlabelled", "moved", 2), "another"),
        (("unlabelled", "damaged", 12), "damaged-12"),
        (("unlabelled", "damaged", 20), "damaged-20"),
        (("unlabelled", "lost", 1), None),
        (("test", "x", 1), None),
    ]

    def open_split(name: str) -> dict[str, Shard]:
        if name == "test":
            raise DataError("the test set is gone")
        return dict(shards)

    found = take_pictures(wanted, open_split, 8, lambda _, shard: shard.name == "changed")
    assert set(found.uris) == {("unlabelled", "good", 2), ("unlabelled", "damaged", 12)}
    text = "\n".join(found.notes)
    for words in (
        "changed since",
        "moved: row 2 is now moved-2, was another",
        "row 13",
        "lost",
        "the test set is gone",
    ):
        assert words in text
    assert len(found.notes) == 5
    assert shards["changed"].asked == []


def test_pictures_are_made_anew() -> None:
    """Nothing of the original file is in the page but its pixels."""
    buffer = io.BytesIO()
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    image.save(buffer, "JPEG", comment=b"<script>alert(1)</script>", exif=Image.Exif())
    uri = picture(buffer.getvalue(), 96)
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    assert b"script" not in base64.b64decode(uri.split(",")[1])
    assert pixels_of(uri).shape == (96, 96, 3)
    assert picture(b"<svg onload=alert(1)>", 96) is None
    small = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert np.array_equal(pixels_of(data_uri(small)), small)


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.5, "50.0%"), (0.974, "97.4%"), (0.9996, "99.96%"), (0.99999, "99.999%"), (0.013, "1.3%"), (0.37, "37.0%")],
)
def test_percentages(p: float, text: str) -> None:
    assert percent(math.log(p) - math.log1p(-p)) == text


def test_percentages_never_reach_the_ends_and_never_fall() -> None:
    odds = np.linspace(-800, 800, 4001)
    texts = [percent(float(z)) for z in odds]
    assert texts[0] == "< 0.0001%"
    assert texts[-1] == "> 99.9999%"
    values = [float(text.strip("<>% ")) for text in texts]
    assert all(a <= b for a, b in pairwise(values))
    assert 0 < min(values) <= max(values) < 100


def test_ticks_cover_and_are_round() -> None:
    for low, high in [(0, 1), (0.31, 0.34), (-5, 1e4), (7, 7), (88.3, 99.2)]:
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 7
        assert ticks[0] <= low + 1e-9
        assert ticks[-1] >= high - 1e-9
        assert np.ptp(np.diff(ticks)) < 1e-9


def test_a_curve_passes_over_what_is_not_finite() -> None:
    chart = step_chart("loss", {"a": ([1, 2, 3], [1.0, math.nan, 2.0]), "b": ([1], [math.inf])})
    (line,) = chart.lines
    assert line.name == "a"
    points = [tuple(map(float, point.split(","))) for point in line.points.split()]
    assert len(points) == 2
    assert points[0][1] > points[1][1]  # more is higher up


def test_text_from_the_web_is_cut_and_made_visible() -> None:
    assert shown("a\x00b\u202ec\nd") == "a\ufffdb\ufffdc\ufffdd"
    assert shown("x" * 500, 10) == "x" * 9 + "…"
