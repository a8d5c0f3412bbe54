"""Joining selection, scores and images into a store; killing it at every file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, RunError
from pipeline.pool.filter import filter_pool
from pipeline.pool.score import score_shard
from pipeline.pool.scores import open_scored
from pipeline.pool.selection import Rules, read_selection
from pipeline.storage.workers import WorkFailed
from pipeline.targets import TargetsStore
from pipeline.targets.build import Ingredients, check_targets, precompute
from pipeline.targets.manifest import StoreSettings, is_precomputed
from pipeline.targets.spill import distinct_images

SETTINGS = StoreSettings(teacher="t", labelled="l", shard_rows=13)


@pytest.fixture
def selected(make_shards, scorer, tmp_path):
    """Four shards, the second empty of anything selected, and a selection of some of them."""
    shards = make_shards((30, 1, 20, 25))
    for shard in shards:
        score_shard(shard, scorer, tmp_path / "scores", fingerprint="f")
    pool = open_scored(shards, tmp_path / "scores", "f")
    filter_pool(pool, tmp_path, Rules(12, upsample=True))
    return shards, pool, read_selection(tmp_path / "selection.parquet")


@pytest.fixture
def labelled(make_shards):
    """Labelled images with one that does not decode."""
    (shard,) = make_shards([9], seed=5)
    files = list(shard.files)
    files[4] = b"broken"
    return [("train", sample) for sample in replace(shard, files=tuple(files)).read()]


def run(folder, selected, labelled, scorer, settings=SETTINGS, **changes):
    shards, pool, selection = selected
    ingredients = Ingredients(selection, shards, labelled, scorer, **{"scores": pool} | changes)
    return precompute(folder, ingredients, settings, preprocessing={"size": 16})


@pytest.mark.parametrize("stored", [True, False])
def test_the_store_holds_what_was_selected(selected, labelled, scorer, tmp_path, stored):
    shards, pool, selection = selected
    manifest = run(tmp_path / "targets", selected, labelled, scorer, scores=pool if stored else None)
    store = TargetsStore.open(tmp_path / "targets", teacher="t", class_names=scorer.class_names)
    files = {(shard.name, sample.row): sample for shard in shards for sample in shard.read()}
    wanted = {}
    for row in selection.table.to_pylist():
        classes, repeat = wanted.setdefault((row["shard"], row["row"]), ([], []))
        classes.append(row["class"])
        repeat.append(row["repeat"])
    places = [(shard, sample.row) for shard, sample in store.samples()]
    assert sorted(places) == sorted(wanted)
    assert places != sorted(places)  # shuffled
    assert [sample.data for _, sample in store.samples()] == [files[place].data for place in places]
    assert store.keys() == [files[place].key for place in places]
    assert store.classes() == [sorted(wanted[place][0]) for place in places]
    assert store.repeats().tolist() == [sum(wanted[place][1]) for place in places]
    assert manifest["uses"] == store.repeats().sum() == 48
    for place, found in zip(places, store.distributions(), strict=True):
        from pipeline.data.decode import decode

        logits = scorer.logits(decode(files[place].data, 16)[0][None]).double()
        np.testing.assert_allclose(found, logits.softmax(dim=1).numpy()[0], atol=6e-4)
    sizes = [file["rows"] for file in manifest["pool"]["files"]]
    assert max(sizes) <= 13
    assert max(sizes) - min(sizes) <= 1
    assert not (tmp_path / "targets" / "spill").exists()

    own = store.labelled()
    assert own.row.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert own.labels.tolist() == [0, 1, 2, 3, 1, 2, 3, 0]
    assert manifest["labelled_skipped"] == 1
    np.testing.assert_allclose(own.distributions.sum(axis=1), 1, atol=1e-6)
    assert check_targets(store, scorer, 10) < 6e-4


def test_float32_is_stored_when_asked_for(selected, labelled, scorer, other_scorer, tmp_path):
    run(tmp_path / "targets", selected, labelled, scorer, replace(SETTINGS, dtype="float32"))
    store = TargetsStore.open(tmp_path / "targets")
    assert check_targets(store, scorer, 1000) < 1e-6
    assert check_targets(store, other_scorer, 1000) > 0.1


@pytest.mark.parametrize("stored", [True, False])
def test_killed_at_any_file_it_goes_on_to_the_same_bytes(selected, labelled, scorer, tmp_path, stored, monkeypatch):
    """Every rename is once the last thing that happens; the next attempt goes on from there."""
    shards, pool, _ = selected
    scores = pool if stored else None
    run(tmp_path / "undisturbed", selected, labelled, scorer, scores=scores)
    reads = [len(shard.reads) for shard in shards]

    class Killed(BaseException):
        pass

    rename = Path.replace
    for attempts in range(1, 40):  # noqa: B007
        done = []

        def one_then_die(path, target, done=done):
            if done:
                raise Killed
            done.append(target)
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", one_then_die)
        try:
            run(tmp_path / "killed", selected, labelled, scorer, scores=scores)
        except Killed:
            continue
        finally:
            monkeypatch.setattr(Path, "replace", rename)
        break
    assert 8 < attempts < 39
    # once per spill file and at most once more for the sizes; the one-image shard may serve no class
    assert all(len(shard.reads) - before <= attempts + 1 for shard, before in zip(shards, reads, strict=True))
    files = sorted(path.relative_to(tmp_path / "undisturbed") for path in (tmp_path / "undisturbed").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*"))
    for path in files:
        assert (tmp_path / "undisturbed" / path).read_bytes() == (tmp_path / "killed" / path).read_bytes()


def test_other_settings_replace_the_store(selected, labelled, scorer, tmp_path):
    folder = tmp_path / "targets"
    run(folder, selected, labelled, scorer)
    selection = selected[2]
    assert is_precomputed(folder, selection, SETTINGS)
    other = replace(SETTINGS, shard_rows=1000, seed=3)
    assert not is_precomputed(folder, selection, other)
    run(folder, selected, labelled, scorer, other)
    assert len(list(folder.glob("pool-*.parquet"))) == 1
    TargetsStore.open(folder)
    run(tmp_path / "fresh", selected, labelled, scorer, other)
    assert (folder / "_manifest.json").read_bytes() == (tmp_path / "fresh" / "_manifest.json").read_bytes()


def test_wrong_inputs_are_named(selected, labelled, scorer, make_shards, shard_of, tmp_path, monkeypatch):
    shards, pool, selection = selected
    with pytest.raises(DataError, match="other scores"):
        run(tmp_path / "a", (shards, pool, replace(selection, scores="x")), labelled, scorer)
    with pytest.raises(DataError, match="the teacher a, b"):
        run(tmp_path / "a", selected, labelled, replace(scorer, class_names=("a", "b")))
    with pytest.raises(DataError, match="which the pool does not have"):
        run(tmp_path / "a", (shards[:2], pool, selection), labelled, scorer)
    shorter = shard_of(shards[0].name, shards[0].files[:3])
    with pytest.raises(DataError, match="selected rows are missing"):
        run(tmp_path / "b", ([shorter, *shards[1:]], pool, selection), labelled, scorer)
    blank = shard_of(shards[0].name, (b"",) * 30)
    with pytest.raises(WorkFailed, match=r"1 of 4 could not be done.*\n.*does not decode"):
        run(tmp_path / "c", ([blank, *shards[1:]], pool, selection), labelled, scorer, scores=None)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(RunError, match="GiB free"):
        run(tmp_path / "d", selected, labelled, scorer)


def test_distinct_images_against_a_dictionary(selected):
    shards, _, selection = selected
    chosen = distinct_images(selection, [shard.name for shard in shards])
    wanted = {}
    for row in selection.table.to_pylist():
        wanted.setdefault((row["shard"], row["row"]), []).append((row["class"], row["repeat"]))
    found = zip(chosen.shard.tolist(), chosen.row.tolist(), chosen.classes.to_pylist(), chosen.repeat, strict=True)
    assert [(shards[s].name, r, c, n) for s, r, c, n in found] == [
        (*place, sorted(c for c, _ in uses), sum(n for _, n in uses)) for place, uses in sorted(wanted.items())
    ]


def test_the_files_are_what_the_format_says(selected, labelled, scorer, tmp_path):
    run(tmp_path / "targets", selected, labelled, scorer)
    schema = pq.read_schema(tmp_path / "targets" / "pool-00000.parquet")
    assert schema.names == ["key", "shard", "row", "image", "distribution", "classes", "repeat"]
    assert schema.field("distribution").type.byte_width == 8
