"""The streaming selection against a full sort."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, UsageError
from pipeline.pool.select import TopK, float32_floor, select_top_k, upsample


def by_full_sort(rows, scores, k, assign="any", floor=-np.inf):
    """Oracle: sort everything in Python, by (score down, id up)."""
    kept = []
    for c in range(scores.shape[1]):
        pairs = [
            (-float(score[c]), int(row))
            for row, score in zip(rows, scores, strict=True)
            if score[c] >= floor and (assign == "any" or int(np.argmax(score)) == c)
        ]
        kept.append(sorted(pairs)[:k])
    return [[row for _, row in pairs] for pairs in kept], [[-s for s, _ in pairs] for pairs in kept]


def cut(rows, scores, cuts):
    """The stream in chunks that end at `cuts`."""
    edges = [0, *sorted(cuts), len(rows)]
    return [(rows[a:b], scores[a:b]) for a, b in itertools.pairwise(edges)]


@st.composite
def problems(draw):
    """Few distinct values, so that ties are common; any ids; any chunking and order."""
    n, classes = draw(st.integers(0, 60)), draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n, unique=True))
    values = st.sampled_from([-np.inf, -3.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 7.0, 3e38, np.inf])
    scores = draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=n, max_size=n))
    cuts = draw(st.lists(st.integers(0, n), max_size=5))
    k, assign = draw(st.integers(1, 70)), draw(st.sampled_from(["any", "argmax"]))
    floor = draw(st.sampled_from([None, -3.5, 0.0, 1.0]))
    return np.array(ids, np.int64), np.array(scores, np.float32).reshape(n, classes), cuts, k, assign, floor


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_a_full_sort_under_any_chunking(problem):
    rows, scores, cuts, k, assign, floor = problem
    chosen = select_top_k(cut(rows, scores, cuts), k, assign, min_log_odds=floor)
    expected, values = by_full_sort(rows, scores, k, assign, -np.inf if floor is None else floor)
    assert [kept.tolist() for kept in chosen.rows] == expected
    assert [kept.tolist() for kept in chosen.scores] == values
    assert all(kept.dtype == np.int64 for kept in chosen.rows)


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_order_chunks_and_workers_do_not_matter(problem, random):
    """Bit for bit: shuffled, cut otherwise, and merged from two states, the bytes are the same."""
    rows, scores, cuts, k, assign, floor = problem
    one = select_top_k([(rows, scores)], k, assign, min_log_odds=floor)
    order = list(range(len(rows)))
    random.shuffle(order)
    two = select_top_k(cut(rows[order], scores[order], cuts), k, assign, min_log_odds=floor)
    half = len(rows) // 3
    left = TopK(k, scores.shape[1], assign, min_log_odds=floor)
    right = TopK(k, scores.shape[1], assign, min_log_odds=floor)
    left.add(rows[order][:half], scores[order][:half])
    right.add(rows[order][half:], scores[order][half:])
    left.merge(right)
    three = left.selection()
    for other in (two, three):
        for a, b in zip(one.rows + one.scores, other.rows + other.scores, strict=True):
            assert a.tobytes() == b.tobytes()
        assert one.available.tobytes() == other.available.tobytes()
        assert one.threshold.tobytes() == other.threshold.tobytes()


@pytest.mark.parametrize(("classes", "k", "n"), [(10, 500, 200_000), (300, 40, 6_000), (1, 3, 100_000)])
@pytest.mark.parametrize("assign", ["any", "argmax"])
def test_many_rows_with_ties(classes, k, n, assign):
    """Long enough that buffers are cut back, thresholds rise and candidates wait; coarse scores tie."""
    random = np.random.RandomState(classes)
    scores = np.round(random.standard_normal((n, classes)) * 50).astype(np.float32)
    rows = random.permutation(n).astype(np.int64) * 7 - 1000
    chunks = [(rows[a : a + 1777], scores[a : a + 1777]) for a in range(0, n, 1777)]
    chosen = select_top_k(chunks, k, assign)
    own = scores.argmax(axis=1)
    for c in range(classes):
        pool = np.arange(n) if assign == "any" else np.flatnonzero(own == c)
        order = pool[np.lexsort((rows[pool], -scores[pool, c]))][:k]
        np.testing.assert_array_equal(chosen.rows[c], rows[order])
        assert chosen.available[c] == len(pool)
        assert chosen.threshold[c] == scores[order[-1], c]


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
    sizes = []
    for at in range(60):
        state.add(np.arange(at * 5000, (at + 1) * 5000), random.rand(5000, 4).astype(np.float32))
        sizes.append(sum(best.buffer.size for best in state.best) + sum(len(e) for _, e in state._pending))
    assert max(best.buffer.size for best in state.best) <= 356
    assert max(sizes[30:]) <= max(sizes[:30])


def test_k_far_beyond_the_rows_takes_no_memory():
    chosen = select_top_k([(np.arange(3), np.ones((3, 2), np.float32))], 10**12)
    assert [len(rows) for rows in chosen.rows] == [3, 3]


def test_no_chunk_and_empty_chunks():
    assert select_top_k([], 3).rows == ()
    chosen = select_top_k([(np.empty(0, np.int64), np.empty((0, 2), np.float32))], 3)
    assert [rows.size for rows in chosen.rows] == [0, 0]
    assert np.isnan(chosen.threshold).all()


@pytest.mark.parametrize("assign", ["any", "argmax"])
@pytest.mark.parametrize("floor", [None, 5.0])
@pytest.mark.parametrize("place", [0, 7, 8, 4999])
def test_nan_is_refused_wherever_it_stands(assign, floor, place):
    scores = np.random.RandomState(0).rand(5000, 3).astype(np.float32)
    scores[place, 1] = np.nan
    rows = np.arange(5000) + 100
    with pytest.raises(DataError, match=f"row {place + 100} for class 1 is NaN"):
        select_top_k([(rows, scores)], 2, assign, min_log_odds=floor)


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


def test_an_id_given_twice_is_refused():
    chunk = (np.arange(4), np.ones((4, 2), np.float32))
    with pytest.raises(DataError, match="row id 0 occurs more than once"):
        select_top_k([chunk, chunk], 3)


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
