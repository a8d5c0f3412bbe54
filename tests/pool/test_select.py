"""The streaming selection against a full sort."""

import itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, UsageError
from pipeline.pool.select import buffer, scan
from pipeline.pool.select import top_k as select
from pipeline.pool.select.buffer import Packed, Paired
from pipeline.pool.select.top_k import TopK, float32_floor, select_top_k, upsample

# The sizes at which another way is taken, so small that a few rows take all of them
ROWWISE = {"STRETCH": 40, "LOOK": 16, "LEAST_THREADED": 1, "PENDING": 9, "PENDING_PER_CLASS": 0, "BATCH": 4}
WAYS = {
    "as it is": {},
    "by class": {"BY_CLASS": -1.0, "LEAST_BY_CLASS": -1, "ROWS_BY_CLASS": 7},
    "by row": {"BY_CLASS": 2.0} | ROWWISE,
    "in turns": {"BY_CLASS": 0.3, "LEAST_BY_CLASS": 1, "ROWS_BY_CLASS": 5} | ROWWISE,
}
SMALL_BLOCKS = {"BLOCK": 24, "BLOCK_TRANSPOSED": 40, "STRIP": 4}


@contextmanager
def taken(way):
    """Chunks go this way."""
    with ExitStack() as stack:
        if WAYS[way]:
            stack.enter_context(mock.patch.multiple(select, **WAYS[way]))
            stack.enter_context(mock.patch.multiple(scan, **SMALL_BLOCKS))
            stack.enter_context(mock.patch.object(buffer, "LEAST_ROOM", 1))
        yield


def state_of(way, chunks, k, classes, assign="any", floor=None, threads=1):
    """A state that took in these chunks."""
    with taken(way):
        state = TopK(k, classes, assign, min_log_odds=floor, threads=threads)
        for rows, scores in chunks:
            state.add(rows, scores)
    return state


def by_full_sort(rows, scores, k, assign="any", floor=None):
    """Oracle: sort everything in Python by (score down, id up); rows, scores, available and threshold per class."""
    found = []
    for c in range(scores.shape[1]):
        pairs = [
            (-float(score[c]), int(row))
            for row, score in zip(rows, scores, strict=True)
            if (floor is None or score[c] >= floor) and (assign == "any" or score.tolist().index(max(score)) == c)
        ]
        kept = sorted(pairs)[:k]
        values = [0.0 - score for score, _ in kept]  # 0.0, never -0.0
        found.append(([row for _, row in kept], values, len(pairs), values[-1] if values else np.nan))
    return found


def assert_is(chosen, expected):
    """Byte for byte."""
    rows, values, available, threshold = zip(*expected, strict=True)
    assert [kept.tobytes() for kept in chosen.rows] == [np.array(kept, np.int64).tobytes() for kept in rows]
    assert [kept.tobytes() for kept in chosen.scores] == [np.array(kept, np.float32).tobytes() for kept in values]
    assert chosen.available.tobytes() == np.array(available, np.int64).tobytes()
    assert chosen.threshold.tobytes() == np.array(threshold, np.float32).tobytes()


def cut(rows, scores, cuts):
    """The stream in chunks that end at `cuts`."""
    edges = [0, *sorted(cuts), len(rows)]
    return [(rows[a:b], scores[a:b]) for a, b in itertools.pairwise(edges)]


ANY_IDS = st.integers(-(2**63), 2**63 - 1)
ORDINALS = st.integers(0, 200)
FAR = st.integers(2**62 - 100, 2**62 + 100)  # still within 2**32 of each other
VALUES = st.sampled_from([-np.inf, -3.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 7.0, 3e38, np.inf])


@st.composite
def problems(draw):
    """Few distinct values, so that ties are common; ids of every kind; rows in any order and any chunking."""
    n, classes = draw(st.integers(0, 60)), draw(st.integers(1, 5))
    ids = draw(st.sampled_from([ANY_IDS, ORDINALS, FAR, ORDINALS | FAR]))
    rows = draw(st.lists(ids, min_size=n, max_size=n, unique=True))
    values = draw(st.sampled_from([VALUES, st.just(2.5), st.floats(width=32, allow_nan=False)]))
    scores = draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=n, max_size=n))
    return {
        "rows": np.array(rows, np.int64),
        "scores": np.array(scores, np.float32).reshape(n, classes),
        "k": draw(st.sampled_from([1, 2, 5, 30, 70])),
        "assign": draw(st.sampled_from(["any", "argmax"])),
        "floor": draw(st.sampled_from([None, -3.5, 0.0, 1.0])),
    }


@settings(max_examples=300, deadline=None)
@given(problems(), st.lists(st.integers(0, 60), max_size=5), st.sampled_from(list(WAYS)), st.integers(1, 3))
def test_equals_a_full_sort_under_any_chunking(problem, cuts, way, threads):
    rows, scores, k, assign, floor = problem.values()
    chunks = cut(rows, scores, [min(at, len(rows)) for at in cuts])
    state = state_of(way, chunks, k, scores.shape[1], assign, floor, threads)
    assert_is(state.selection(), by_full_sort(rows, scores, k, assign, floor))


@settings(max_examples=150, deadline=None)
@given(problems(), st.data())
def test_workers_may_share_the_rows_and_merge_in_any_order(problem, data):
    rows, scores, k, assign, floor = problem.values()
    worker = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))), int)
    ways = data.draw(st.lists(st.sampled_from(list(WAYS)), min_size=4, max_size=4))
    states = [
        state_of(ways[w], [(rows[worker == w], scores[worker == w])], k, scores.shape[1], assign, floor)
        for w in range(4)
    ]
    while len(states) > 1:
        one = states.pop(data.draw(st.integers(0, len(states) - 1)))
        states[data.draw(st.integers(0, len(states) - 1))].merge(one)
    assert_is(states[0].selection(), by_full_sort(rows, scores, k, assign, floor))


@settings(max_examples=50, deadline=None)
@given(problems(), st.randoms(use_true_random=False), st.sampled_from(list(WAYS)))
def test_rows_may_come_in_any_order_and_reading_in_between_changes_nothing(problem, random, way):
    rows, scores, k, assign, floor = problem.values()
    order = np.array(random.sample(range(len(rows)), len(rows)), int)
    state = TopK(k, scores.shape[1], assign, min_log_odds=floor)
    with taken(way):
        for at in range(0, len(order), 9):
            state.add(rows[order[at : at + 9]], scores[order[at : at + 9]])
            state.selection()
    assert_is(state.selection(), by_full_sort(rows, scores, k, assign, floor))


def test_ids_that_lie_far_apart_are_held_as_they_are():
    """Packed into 32 bits while they fit, whatever they begin with; paired with their scores from then on."""
    ids = [np.arange(300), np.arange(300) + 2**62, np.array([-5, 2**32 - 6]), np.array([2**63 - 1, -(2**63)])]
    scores = np.random.RandomState(0).permutation(604).astype(np.float32).reshape(-1, 1) % 40
    one_by_one = [([chunk], Packed) for chunk in (*ids[:3], ids[3][:1], ids[3][1:])]
    for chunks, kind in [*one_by_one, (ids[3:], Paired), (ids[:2], Paired), (ids, Paired)]:
        rows, values = np.concatenate(chunks), scores[: sum(map(len, chunks))]
        state = TopK(50, 1)
        for chunk in cut(rows, values, np.cumsum([len(chunk) for chunk in chunks])[:-1]):
            state.add(*chunk)
        assert isinstance(state.kind, kind)
        assert_is(state.selection(), by_full_sort(rows, values, 50))


@pytest.mark.parametrize(("classes", "k", "n"), [(10, 500, 200_000), (300, 40, 6_000), (1, 3, 100_000)])
@pytest.mark.parametrize("assign", ["any", "argmax"])
@pytest.mark.parametrize("step", [1777, 50_000])
def test_many_rows_with_ties(classes, k, n, assign, step):
    """Long enough that buffers are cut back, thresholds rise and candidates wait; coarse scores tie."""
    random = np.random.RandomState(classes)
    scores = np.round(random.standard_normal((n, classes)) * 50).astype(np.float32)
    rows = random.permutation(n).astype(np.int64) * 7 - 1000
    chunks = [(rows[a : a + step], scores[a : a + step]) for a in range(0, n, step)]
    chosen = select_top_k(chunks, k, assign)
    own = scores.argmax(axis=1)
    for c in range(classes):
        pool = np.arange(n) if assign == "any" else np.flatnonzero(own == c)
        order = pool[np.lexsort((rows[pool], -scores[pool, c]))][:k]
        np.testing.assert_array_equal(chosen.rows[c], rows[order])
        assert chosen.available[c] == len(pool)
        assert chosen.threshold[c] == scores[order[-1], c]


@pytest.mark.parametrize(("rows", "classes"), [(4003, 1000), (9001, 1), (5, 20_000)])
def test_available_counts_every_row_at_the_floor_or_above(rows, classes):
    scores = np.random.RandomState(0).randint(0, 5, (rows, classes)).astype(np.float32)
    scores[:, 0] = 2
    chosen = select_top_k([(np.arange(rows), scores)], 1, min_log_odds=2)
    np.testing.assert_array_equal(chosen.available, (scores.astype(int) >= 2).sum(axis=0))


def test_rising_scores_are_exact_too():
    """The worst order for a threshold: every row beats all before it."""
    n, k = 50_000, 100
    scores = np.stack([np.arange(n), -np.arange(n)], axis=1).astype(np.float32)
    chosen = select_top_k([(np.arange(a, a + 500), scores[a : a + 500]) for a in range(0, n, 500)], k)
    np.testing.assert_array_equal(chosen.rows[0], np.arange(n - 1, n - 1 - k, -1))
    np.testing.assert_array_equal(chosen.rows[1], np.arange(k))


def test_all_equal_keeps_the_lowest_ids():
    rows = np.random.RandomState(0).permutation(30_000)
    chosen = select_top_k([(rows[a : a + 999], np.ones((999, 3), np.float32)[: len(rows[a : a + 999])])
                           for a in range(0, 30_000, 999)], 5)  # fmt: skip
    for kept in chosen.rows:
        np.testing.assert_array_equal(kept, np.arange(5))


def test_memory_does_not_grow_with_the_stream():
    state = TopK(100, 4)
    random = np.random.RandomState(0)
    for at in range(60):
        state.add(np.arange(at * 5000, (at + 1) * 5000), random.rand(5000, 4).astype(np.float32))
        assert sum(each.slots.nbytes for each in state.buffers) <= 4 * (24 * 100 + 8 * buffer.LEAST_ROOM)
        assert state._waiting <= select.PENDING


def test_k_far_beyond_the_rows_takes_no_memory():
    chosen = select_top_k([(np.arange(3), np.ones((3, 2), np.float32))], 10**12)
    assert [len(rows) for rows in chosen.rows] == [3, 3]


def test_no_chunk_and_empty_chunks():
    assert select_top_k([], 3).rows == ()
    chosen = select_top_k([(np.empty(0, np.int64), np.empty((0, 2), np.float32))], 3)
    assert [rows.size for rows in chosen.rows] == [0, 0]
    assert np.isnan(chosen.threshold).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("assign", ["any", "argmax"])
@pytest.mark.parametrize("floor", [None, 5.0])
@pytest.mark.parametrize(("place", "nan"), [(0, np.nan), (7, -np.nan), (8, np.nan), (499, np.nan)])
def test_nan_is_refused_wherever_it_stands(way, assign, floor, place, nan):
    scores = np.random.RandomState(0).rand(500, 3).astype(np.float32)
    scores[place, 1] = nan
    with pytest.raises(DataError, match=f"row {place + 100} for class 1 is NaN"):
        state_of(way, [(np.arange(500) + 100, scores)], 2, 3, assign, floor, threads=2)


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", None, True])
def test_k_must_be_a_positive_whole_number(k):
    with pytest.raises(UsageError, match="at least 1"):
        select_top_k([], k)


def test_wrong_arguments_are_named():
    with pytest.raises(UsageError, match='"any" or "argmax"'):
        select_top_k([], 1, "best")
    with pytest.raises(UsageError, match="NaN"):
        select_top_k([], 1, min_log_odds=float("nan"))
    with pytest.raises(DataError, match=r"expected \(n,\) and \(n, 3\)"):
        select_top_k([(np.arange(2), np.ones((2, 3), np.float32)), (np.arange(2), np.ones((2, 4), np.float32))], 1)
    with pytest.raises(DataError, match="integers"):
        select_top_k([(np.arange(2.0), np.ones((2, 3), np.float32))], 1)
    with pytest.raises(DataError, match="float32"):
        select_top_k([(np.arange(2), np.ones((2, 3), np.int64))], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("far", [0, 2**40])
def test_an_id_given_twice_is_refused(way, far):
    chunk = (np.array([5, 6, 7, 8 + far]), np.ones((4, 2), np.float32))
    with pytest.raises(DataError, match=r"row id 5 occurs more than once .* class 0"):
        state_of(way, [chunk, chunk], 3, 2).selection()
    left, right = TopK(3, 2), TopK(3, 2)
    left.add(*chunk)
    right.add(*chunk)
    left.merge(right)
    with pytest.raises(DataError, match="row id 5 occurs more than once"):
        left.selection()


def test_states_of_other_settings_are_not_merged():
    with pytest.raises(UsageError, match="different settings"):
        TopK(3, 2).merge(TopK(4, 2))


@given(st.floats(-50, 50))
def test_the_floor_is_never_rounded_down(floor):
    rounded = float32_floor(floor)
    assert float(rounded) >= floor
    assert float(np.nextafter(rounded, np.float32(-np.inf))) < floor


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 40))
def test_upsampling_fills_up_to_k(counts, k):
    for count, repeat in zip(counts, upsample(counts, k), strict=True):
        assert len(repeat) == count
        if count:
            assert repeat.sum() == max(k, count)
            assert repeat.max() - repeat.min() <= 1
            assert (np.diff(repeat) <= 0).all()  # the best ranks first
