"""Selecting from scores: against a plain Python account of what should happen to every image."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, UsageError
from pipeline.log_odds import log_odds
from pipeline.pool.copies.index import CopyIndex
from pipeline.pool.filter import filter_pool, is_filtered
from pipeline.pool.repeats import find_repeats
from pipeline.pool.score import score_shard
from pipeline.pool.scores import open_scored, shard_file
from pipeline.pool.selection import Rules
from pipeline.storage.texts import hash_texts


@pytest.fixture
def dirty_pool(make_shards, shard_of, images_of, scorer, tmp_path):
    """Three shards with bad files, repeats across shards, and copies; scored."""
    one, two, three = make_shards()
    files = [list(shard.files) for shard in (one, two, three)]
    files[0][3], files[0][9], files[1][0] = b"", b"rubbish", files[1][0][:70]
    files[1][5], files[2][1], files[2][2] = files[0][4], files[0][4], files[2][7]  # repeats
    shards = [
        shard_of("pool-a", tuple(files[0])),
        shard_of("pool-b", tuple(files[1]), first=100, keys=tuple(f"k{at % 15}" for at in range(20))),
        shard_of("pool-c", tuple(files[2])),
    ]
    evaluation = images_of(30, 0)[[11, 12]]
    for shard in shards:
        score_shard(shard, scorer, tmp_path / "scores", fingerprint="f", copies=CopyIndex(evaluation, ["t/0", "t/1"]))
    return shards, open_scored(shards, tmp_path / "scores", "f")


def account(shards, scorer):
    """(shard, row) -> what decode and model say, straight from the files."""
    from pipeline.data.decode import decode

    told, seen = {}, {}
    for shard in shards:
        for sample in shard.read():
            pixels, status, _ = decode(sample.data, scorer.size)
            place = (shard.name, sample.row)
            if pixels is None:
                told[place] = str(status)
            elif pixels.tobytes() in seen:
                told[place] = seen[pixels.tobytes()]
            else:
                seen[pixels.tobytes()] = place
                told[place] = log_odds(scorer.logits(pixels[None])).numpy()[0]
    return told


@pytest.mark.parametrize("assign", ["any", "argmax"])
@pytest.mark.parametrize("floor", [0.0, 0.6])
@pytest.mark.parametrize("k", [1, 7, 1000])
def test_every_image_is_accounted_for(dirty_pool, scorer, tmp_path, assign, floor, k):
    shards, pool = dirty_pool
    result = filter_pool(pool, tmp_path, Rules(k, assign, floor, copy_threshold=0.95, upsample=True))
    told = account(shards, scorer)
    selection = pq.read_table(tmp_path / "selection.parquet").to_pylist()
    rejected = [row for path in sorted((tmp_path / "rejected").iterdir()) for row in pq.read_table(path).to_pylist()]
    kept = {(row["shard"], row["row"]) for row in selection}
    out = {(row["shard"], row["row"]): row for row in rejected}

    assert kept | out.keys() == told.keys()
    assert not kept & out.keys()
    assert result.images == 75 == result.kept + sum(result.rejected.values())
    assert result.kept == len(kept)
    assert len(out) == len(rejected)
    copies = {("pool-a", 11), ("pool-a", 12)}
    floor_odds = np.log(floor / (1 - floor)) if floor else -np.inf
    lines = {row["class"]: row["log_odds"] for row in selection if row["rank"] == k - 1}  # of the classes that are full
    for place, said in told.items():
        reason = out[place]["reason"] if place in out else None
        if isinstance(said, str):
            assert reason == said
        elif place in copies:
            assert (reason, out[place]["match"]) == ("eval_copy", f"t/{place[1] - 11}")
            assert out[place]["similarity"] > 0.95
            assert out[place]["mirrored"] is False
        elif isinstance(said, tuple):
            assert (reason, out[place]["match"]) == ("repeat_of", f"{said[0]}/{said[1]}")
        elif place in out:
            low = 1 / (1 + np.exp(-said.max())) < floor
            assert reason == ("below_probability" if low else "below_k")
            gaps = {c: said[c] - line for c, line in lines.items() if said[c] >= floor_odds}
            nearest = int(said.argmax()) if low or assign == "argmax" else max(gaps, key=gaps.get)
            assert out[place]["class"] == nearest
            assert out[place]["log_odds"] == pytest.approx(said[nearest], rel=1e-4, abs=1e-5)
            assert out[place]["needed"] == pytest.approx(floor_odds if low else lines[nearest])
            assert out[place]["log_odds"] <= out[place]["needed"]
        if isinstance(said, str | tuple) or place in copies:
            assert {out[place][name] for name in ("class", "log_odds", "needed")} == {None}
        if not isinstance(said, str) and place in out:
            assert out[place]["detail"] is None
        if place in out and place not in copies:
            assert out[place]["mirrored"] is None
    for c in range(4):
        able = {
            place: said[c]
            for place, said in told.items()
            if isinstance(said, np.ndarray) and place not in copies and (assign == "any" or said.argmax() == c)
            and 1 / (1 + np.exp(-said[c])) >= floor
        }  # fmt: skip
        best = sorted(able, key=lambda place: (-able[place], place))[:k]
        rows = [row for row in selection if row["class"] == c]
        assert [(row["shard"], row["row"]) for row in rows] == best
        assert [row["rank"] for row in rows] == list(range(len(best)))
        np.testing.assert_allclose([row["log_odds"] for row in rows], [able[p] for p in best], rtol=1e-4, atol=1e-5)
        count = result.classes[c]
        assert (count.available, count.kept, count.short) == (len(able), len(best), k - len(best))
        if best:
            assert sum(row["repeat"] for row in rows) == k


def test_probability_is_the_sigmoid_and_keys_are_the_images_own(dirty_pool, tmp_path):
    shards, pool = dirty_pool
    result = filter_pool(pool, tmp_path, Rules(50))
    keys = {(shard.name, sample.row): sample.key for shard in shards for sample in shard.read()}
    for row in pq.read_table(tmp_path / "selection.parquet").to_pylist():
        assert row["key"] == keys[row["shard"], row["row"]]
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(-row["log_odds"])))
        assert row["repeat"] == 1
    assert result.repeated_keys == 5  # k0 to k4 of pool-b


def test_another_k_needs_no_teacher_and_the_same_k_gives_the_same_bytes(dirty_pool, tmp_path):
    _, pool = dirty_pool
    filter_pool(pool, tmp_path / "a", Rules(5, copy_threshold=0.95))
    assert is_filtered(pool, tmp_path / "a", Rules(5, copy_threshold=0.95))
    assert not is_filtered(pool, tmp_path / "a", Rules(6, copy_threshold=0.95))
    filter_pool(pool, tmp_path / "b", Rules(9))
    filter_pool(pool, tmp_path / "b", Rules(5, copy_threshold=0.95))
    for path in (tmp_path / "a").rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_killed_between_files_is_not_taken_for_done(dirty_pool, tmp_path, monkeypatch):
    """Rejects of new rules never lie beside a selection of old ones."""
    _, pool = dirty_pool
    filter_pool(pool, tmp_path, Rules(5))

    def killed(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.pool.filter.write_selection", killed)
    with pytest.raises(KeyboardInterrupt):
        filter_pool(pool, tmp_path, Rules(6))
    assert not is_filtered(pool, tmp_path, Rules(5))
    assert not is_filtered(pool, tmp_path, Rules(6))


def test_a_class_without_candidates_is_told_and_no_error(dirty_pool, tmp_path):
    _, pool = dirty_pool
    best = [count.threshold for count in filter_pool(pool, tmp_path, Rules(1)).classes]
    lowest, second = sorted(best)[:2]
    floor = 1 / (1 + np.exp(-(lowest + second) / 2))
    classes = filter_pool(pool, tmp_path, Rules(3, min_probability=floor)).classes
    empty = int(np.argmin(best))
    assert [count.kept > 0 for count in classes] == [c != empty for c in range(4)]
    assert (classes[empty].available, classes[empty].short, classes[empty].threshold) == (0, 3, None)
    assert not (pq.read_table(tmp_path / "selection.parquet").column("class").to_numpy() == empty).any()


def test_nothing_to_keep_is_an_error_that_tells_why(shard_of, make_shards, scorer, tmp_path):
    shard = shard_of("bad", (b"", b"x", b""))
    score_shard(shard, scorer, tmp_path, fingerprint="f")
    with pytest.raises(DataError, match="of 3 images, 2 empty, 1 decode_error"):
        filter_pool(open_scored([shard], tmp_path, "f"), tmp_path / "out", Rules(3))
    assert not (tmp_path / "out" / "selection.parquet").exists()
    assert len(pq.read_table(tmp_path / "out" / "rejected")) == 3


def test_scores_that_are_missing_or_foreign(dirty_pool, make_shards, shard_of, tmp_path):
    shards, _ = dirty_pool
    folder = tmp_path / "scores"
    with pytest.raises(DataError, match="another teacher"):
        open_scored(shards, folder, "g")
    with pytest.raises(DataError, match="two shards named 'pool-a'"):
        open_scored([shards[0], shards[0]], folder, "f")
    with pytest.raises(DataError, match="no shard"):
        open_scored([], folder, "f")
    shard_file(folder, "pool-b").unlink()
    with pytest.raises(DataError, match=r"3 shards, 1 are missing in .* \(pool-b\)"):
        open_scored(shards, folder, "f")
    shutil.copy(shard_file(folder, "pool-a"), shard_file(folder, "pool-b"))
    with pytest.raises(DataError, match="score it again"):
        open_scored(shards, folder, "f")


def test_a_damaged_page_is_found(dirty_pool, tmp_path):
    _shards, pool = dirty_pool
    path = shard_file(tmp_path / "scores", "pool-b")
    data = bytearray(path.read_bytes())
    at = data.find(pq.read_table(path).column("log_odds").combine_chunks().buffers()[1].to_pybytes()[40:80])
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        filter_pool(pool, tmp_path / "out", Rules(3))


@pytest.mark.parametrize("rules", [{"k": 0}, {"k": 1, "assign": "best"}, {"k": 1, "min_probability": 1.0}])
def test_rules_that_make_no_sense(rules):
    with pytest.raises(UsageError):
        Rules(**rules)


@pytest.mark.parametrize("bucket", [1 << 23, 700])
def test_repeats_against_a_dictionary(bucket, monkeypatch):
    """Few distinct hashes; also in several buckets, when the rows do not fit into one."""
    monkeypatch.setattr("pipeline.pool.repeats.BUCKET_ROWS", bucket)
    random = np.random.RandomState(0)
    words = random.randint(0, 2**40, (900, 2)).astype(np.uint64)[random.randint(0, 900, 3000)]
    seen, expected = {}, []
    for at, pair in enumerate(map(tuple, words.tolist())):
        if pair in seen:
            expected.append((at, seen[pair]))
        seen.setdefault(pair, at)
    found = find_repeats(3000, lambda: ((np.arange(a, a + 500), words[a : a + 500]) for a in range(0, 3000, 500)))
    assert list(zip(found.later.tolist(), found.first.tolist(), strict=True)) == expected
    assert found.first_of(np.array([expected[0][0], 0])).tolist() == [expected[0][1], -1]


def test_text_hashes():
    import pyarrow as pa

    texts = [
        "",
        "a",
        "b",
        "ab",
        "ba",
        "aa",
        "\x00",
        "\x00\x00",
        "pool-0-1",
        "pool-01-",
        "é",
        "x" * 1000,
        "x" * 1001,
    ]
    whole = hash_texts(pa.array(texts))
    assert len({tuple(pair) for pair in whole.tolist()}) == len(texts)
    np.testing.assert_array_equal(hash_texts(pa.array(texts).slice(3, 4)), whole[3:7])
    np.testing.assert_array_equal(hash_texts(pa.array(texts[::-1])), whole[::-1])
    many = hash_texts(pa.array([f"n{at:08d}.jpg" for at in range(200_000)]))
    assert len(np.unique(many[:, 0])) == 200_000
    assert np.bincount((many[:, 1] % np.uint64(16)).astype(int)).min() > 11_000
