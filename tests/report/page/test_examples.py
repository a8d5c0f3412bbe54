"""Choosing examples among many rows, against full sorts of the same rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.pool.rejected import REJECTED, SCHEMA
from pipeline.pool.scores import shard_file
from pipeline.pool.selection import SELECTION
from pipeline.report.page.dropped import FIELDS, find_dropped, match_place, rejected_shards, why
from pipeline.report.page.examples import TopRows, scramble, spread
from pipeline.report.page.kept import choose_shards, kept_classes, open_selected
from pipeline.storage.tables import TableFormat, write_table
from tests.pool.former import pool as former

NAMES = ["cat", "dog", "<b>"]
MARK = "of this selection"


@given(st.integers(0, 200), st.integers(0, 40))
def test_spread_is_the_whole_or_its_top_middle_and_end(rows: int, wanted: int) -> None:
    places, ends = spread(rows, wanted)
    assert len(places) == min(rows, wanted)
    assert (np.diff(places) > 0).all()
    assert places.tolist() == [place for place in places.tolist() if 0 <= place < rows]
    if rows > wanted:
        assert ends == wanted // 3
        assert places[:ends].tolist() == list(range(ends))
        assert places[len(places) - ends :].tolist() == list(range(rows - ends, rows))
        between = np.diff(places[ends : len(places) - ends])
        assert np.ptp(between) <= 1 if len(between) else True  # evenly
        if wanted:
            assert abs((places[ends] - ends) - (rows - ends - 1 - places[len(places) - ends - 1])) <= 1  # and centred


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(-3, 3)), max_size=12), max_size=6),
    st.integers(0, 4),
)
def test_best_equals_a_full_sort_under_any_chunking(chunks: list[list[tuple[int, int]]], n: int) -> None:
    """Ties included: what came first stays."""
    best = TopRows(3, n, pa.schema([("at", pa.int64())]))
    begin = 0
    for chunk in chunks:
        group = np.array([g for g, _ in chunk], np.int64)
        value = np.array([-np.inf if v == -3 else np.nan if v == -2 else v for _, v in chunk], np.float64)
        best.add(group, value, pa.table({"at": np.arange(begin, begin + len(chunk))}))
        begin += len(chunk)
    every = [(g, v, at) for at, (g, v) in enumerate(pair for chunk in chunks for pair in chunk) if v > -2]
    for group in range(3):
        expected = sorted(((-v, at) for g, v, at in every if g == group))[:n]
        values, rows = best.of(group)
        assert [(-v, row["at"]) for v, row in zip(values.tolist(), rows, strict=True)] == expected


def test_a_sample_does_not_depend_on_the_order_of_reading() -> None:
    rows = np.arange(20_000)
    whole = scramble(3, rows)
    assert np.array_equal(np.concatenate([scramble(3, rows[7:]), scramble(3, rows[:7])]), np.roll(whole, -7))
    assert not np.array_equal(whole, scramble(4, rows))
    assert abs(whole.mean() - 0.5) < 5 / np.sqrt(12 * len(rows))  # five standard errors
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 5 / np.sqrt(len(rows))


@dataclass(frozen=True)
class Made:
    """Files of a run, and what is in them: kept (class → (log_odds, shard, row)), lost (rows of rejected/)."""

    folder: Path
    shards: list[str]
    kept: list[list[tuple[float, str, int]]]
    lost: list[dict]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """40 shards of 90 rows: a third kept for one class or two, the rest left out; many ties."""
    random = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("made")
    shards = [f"pool/{i:02d}" for i in range(40)]
    kept: list[list[tuple[float, str, int]]] = [[] for _ in NAMES]
    lost: list[dict] = []
    for shard in shards:
        for row in random.permutation(90).tolist():
            odds = random.integers(0, 60, 3) / 4
            if random.random() < 1 / 3:
                for c in {int(odds.argmax()), int(random.integers(3))}:
                    kept[c].append((float(odds[c]) + 20, shard, row))
            else:
                lost.append(_lost(random, shard, row, odds))
    for rows in kept:
        rows.sort(key=lambda r: (-r[0], r[1], r[2]))
    _write_selection(folder / "selection.parquet", shards, kept)
    for shard in shards:
        _write_rejected(shard_file(folder / "rejected", shard), [r for r in lost if r["shard"] == shard])
    return Made(folder, shards, kept, lost)


def _lost(random: np.random.Generator, shard: str, row: int, odds: np.ndarray) -> dict:
    reason = str(random.choice(["below_k", "below_probability", "eval_copy", "repeat_of", "empty"]))
    lost = dict.fromkeys(FIELDS.names) | {"key": f"{shard}-{row}", "shard": shard, "row": row, "reason": reason}
    if reason.startswith("below"):
        label = int(odds.argmax())
        lost |= {"class": label, "log_odds": float(odds[label]), "needed": float(random.integers(30))}
    elif reason == "eval_copy":
        similarity = float(np.float32(random.integers(80, 100) / 100))
        lost |= {"similarity": similarity, "match": "test/a/b/7", "mirrored": bool(row % 2)}
    elif reason == "repeat_of":
        lost |= {"similarity": 1.0, "match": f"{shard}/3"}
    else:
        lost |= {"detail": "no bytes"}
    return lost


def _write_selection(path: Path, shards: list[str], kept: list[list[tuple[float, str, int]]]) -> None:
    rows = [(c, rank, *row) for c, group in enumerate(kept) for rank, row in enumerate(group)]
    label, rank, odds, shard, row = (list(column) for column in zip(*rows, strict=True))
    table = pa.table(
        {
            "key": [f"{s}-{r}" for s, r in zip(shard, row, strict=True)],
            "shard": pa.array(shard).dictionary_encode(),
            "row": pa.array(row, pa.int64()),
            "class": pa.array(label, pa.int32()),
            "rank": pa.array(rank, pa.int64()),
            "log_odds": pa.array(odds, pa.float32()),
            "probability": pa.array(1 / (1 + np.exp(-np.array(odds)))),
            "repeat": pa.array([1] * len(row), pa.int64()),
        }
    )
    notes = {"fingerprint": MARK, "scores": "x", "class_names": NAMES, "k": len(kept[0])}
    write_table(path, SELECTION, table, notes, group=101)


def _write_rejected(path: Path, rows: list[dict], mark: str = MARK, kind: TableFormat = REJECTED) -> None:
    table = pa.Table.from_pylist(rows, FIELDS).cast(SCHEMA)
    write_table(path, kind, table, {"fingerprint": mark, "class_names": NAMES}, group=17)


def test_kept_examples_are_those_of_a_full_sort(made: Made) -> None:
    selected = open_selected(made.folder / "selection.parquet")
    assert selected.counts.tolist() == [len(rows) for rows in made.kept]
    serves: dict[tuple[str, int], list[int]] = {}
    for c, rows in enumerate(made.kept):
        for _, shard, row in rows:
            serves.setdefault((shard, row), []).append(c)
    for c, found in enumerate(kept_classes(selected, made.shards, 9, whole=True)):
        rows = made.kept[c]
        ranks = spread(len(rows), 9)[0].tolist()
        assert [(e.log_odds, e.shard, e.row, e.rank) for e in found.examples] == [(*rows[r], r) for r in ranks]
        assert [e.serves for e in found.examples] == [tuple(serves[rows[r][1:]]) for r in ranks]
        assert found.log_odds.tolist() == [rows[r][0] for r in found.ranks.tolist()]
        assert (found.ranks[0], found.ranks[-1]) == (0, len(rows) - 1)


@pytest.mark.parametrize("limit", [1, 7, 39])
def test_few_shards_are_looked_into_and_examples_are_the_best_in_them(made: Made, limit: int) -> None:
    selected = open_selected(made.folder / "selection.parquet")
    chosen = choose_shards(selected, made.shards, 9, limit)
    assert len(chosen) == limit
    assert chosen == [shard for shard in made.shards if shard in set(chosen)]
    firsts = [rows[0][1] for rows in made.kept]
    assert len(set(firsts) & set(chosen)) == min(limit, len(set(firsts)))  # the surest of each class come first
    for c, found in enumerate(kept_classes(selected, chosen, 9, whole=False)):
        there = [(rank, row) for rank, row in enumerate(made.kept[c]) if row[1] in chosen]
        places = spread(len(there), 9)[0].tolist()
        assert [(e.rank, (e.log_odds, e.shard, e.row)) for e in found.examples] == [there[p] for p in places]
        assert found.rows == len(made.kept[c])


@pytest.mark.parametrize("some", [slice(None), slice(5, 12)])
def test_those_below_the_line_are_the_nearest_of_a_full_sort(made: Made, some: slice) -> None:
    shards = made.shards[some]
    found = find_dropped(made.folder / "rejected", shards, 3, MARK, below=6, samples=4)
    inside = [row for row in made.lost if row["shard"] in shards]
    for c in range(3):
        mine = [row for row in inside if row["class"] == c]
        mine.sort(key=lambda row: -row["log_odds"])  # stable: ties stay in the order of the files
        assert [(e.key, e.log_odds, e.needed, e.label, e.reason) for e in found.below[c]] == [
            (row["key"], row["log_odds"], row["needed"], c, row["reason"]) for row in mine[:6]
        ]
    copies = sorted((row for row in inside if row["reason"] == "eval_copy"), key=lambda row: row["similarity"])
    assert [e.key for e in found.least_alike] == [row["key"] for row in copies[:4]]
    for reason in ("eval_copy", "repeat_of", "empty"):
        drawn = {(e.key, e.reason) for e in found.samples[reason]}
        assert len(drawn) == 4
        assert drawn <= {(row["key"], reason) for row in inside}
    assert found.counts == {r: sum(row["reason"] == r for row in inside) for r in {row["reason"] for row in inside}}
    assert not found.missing


def test_rejects_of_another_selection_are_named_and_not_shown(made: Made, tmp_path: Path) -> None:
    for shard, mark in (("a", MARK), ("b", "of another one")):
        _write_rejected(shard_file(tmp_path, shard), [made.lost[0] | {"shard": shard}], mark)
    shard_file(tmp_path, "c").write_bytes(b"PAR1 cut short")
    assert rejected_shards(tmp_path) == ["a", "b", "c"]
    found = find_dropped(tmp_path, ["a", "b", "c", "d"], 3, MARK, below=2, samples=2)
    assert found.missing == ("b", "c", "d")
    assert found.counts.total() == 1
    assert "part-b.parquet belongs to another selection; run mpl filter" in found.problem


def test_rejects_of_the_version_before_are_refused_with_what_to_run() -> None:
    """Files as that version wrote them."""
    shards = rejected_shards(former.HERE / "rejected")
    assert shards == ["pool a/1", "pool b", "pool c"]
    mark = open_selected(former.HERE / "selection.parquet").fingerprint
    found = find_dropped(former.HERE / "rejected", shards, 4, mark, below=2, samples=2)
    assert found.missing == tuple(shards)
    assert "is mpl-rejected version 1, expected mpl-rejected version 2; run mpl filter, which makes" in found.problem


def test_a_sentence_is_made_of_the_numbers(made: Made) -> None:
    found = find_dropped(made.folder / "rejected", made.shards, 3, MARK, below=1, samples=1)
    below, copy = found.below[1][0], found.samples["eval_copy"][0]
    assert why(below, NAMES) == f"dog: log-odds {below.log_odds:.4f}, needs {below.needed:.4f}"
    mirrored = ", mirrored" if copy.mirrored else ""
    assert copy.mirrored == bool(copy.row % 2)
    assert why(copy, NAMES) == f"similarity {copy.similarity:.4f} to test/a/b/7{mirrored}"
    assert why(found.samples["empty"][0], NAMES) == "no bytes"


def test_where_a_match_lies(made: Made) -> None:
    found = find_dropped(made.folder / "rejected", made.shards, 3, MARK, below=0, samples=1)
    assert match_place(found.samples["eval_copy"][0]) == ("test", "a/b", 7)
    repeat = found.samples["repeat_of"][0]
    assert match_place(repeat) == ("unlabelled", repeat.shard, 3)
    assert match_place(found.samples["empty"][0]) is None
