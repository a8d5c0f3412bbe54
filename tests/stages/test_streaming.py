"""`mpl train-reduced` from a pool that is streamed: chosen by memory, recorded, and killed without harm."""

import json
import shutil

from safetensors.torch import load_file

from tests.stages.commands import start, wait_for_step

STREAM = ("--set", "train_reduced.reading=stream")
SMALL_SHARDS = ("--set", "precompute.shard_rows=50")


def record(run, stage="train-reduced"):
    return json.loads((run / stage / "record.json").read_text())


def test_how_the_pool_is_read_is_recorded_and_memory_decides(mpl, run):
    in_memory = record(run)
    assert in_memory["result"]["pool_reading"] == "memory"
    assert "reading" not in in_memory["basis"]  # as in runs from before there was a choice
    assert not {"reading", "workers"} & in_memory["basis"]["settings"].keys()
    assert mpl("train-reduced", "--run", run, "--set", "train_reduced.reading=memory").status == 0
    assert record(run) == in_memory  # nothing was done

    refused = mpl("train-reduced", "--run", run, *STREAM)
    assert refused.status == 1
    assert "reading" in refused.err
    assert mpl("train-reduced", "--run", run, "--name", "streamed", *STREAM).status == 0
    streamed = record(run, "train-reduced-streamed")
    assert streamed["basis"]["reading"] == streamed["result"]["pool_reading"] == "stream"
    assert streamed["result"]["pool_images"] == in_memory["result"]["pool_images"]
    assert streamed["result"]["weights_sha256"] != in_memory["result"]["weights_sha256"]  # another order

    # Too little memory comes to the same, and nothing is done again; threads change nothing either.
    small = ("--set", "data.memory_gib=1e-6", "--set", "train_reduced.workers=0")
    assert mpl("train-reduced", "--run", run, "--name", "streamed", *small).status == 0
    assert record(run, "train-reduced-streamed") == streamed


def test_without_a_pool_there_is_nothing_to_read(mpl, run):
    arguments = ("--run", run, "--teacher", "none", "--name", "supervised", *STREAM)
    assert mpl("train-reduced", *arguments).status == 0
    found = record(run, "train-reduced-supervised")
    assert found["result"]["pool_reading"] is None
    assert "reading" not in found["basis"]


def test_both_formats_train_the_same_student(mpl, run):
    """Streamed and in memory, from images in Parquet and in tars."""
    weights = []
    for format in ("parquet", "webdataset"):
        change = ("--set", f"precompute.format={format}", *SMALL_SHARDS)
        assert mpl("precompute", "--run", run, "--force", *change).status == 0
        files = len(list((run / "targets").glob("pool-*.parquet")))
        assert files > 3
        assert len(list((run / "targets").glob("pool-*.tar"))) == (files if format == "webdataset" else 0)
        for way in ("memory", "stream"):
            name = f"{format}-{way}"
            done = mpl("train-reduced", "--run", run, "--name", name, "--set", f"train_reduced.reading={way}", *change)
            assert done.status == 0, done.err
            weights.append(record(run, f"train-reduced-{name}")["result"]["weights_sha256"])
    assert weights[:2] == weights[2:]
    assert weights[0] != weights[1]


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(mpl, run, tmp_path):
    """2N steps = N + kill -9 + the same command, from the training shard where it stood."""
    changes = [*STREAM, *SMALL_SHARDS, "--set", "train_reduced.steps=90", "--set", "train_reduced.checkpoint_every=10"]
    assert mpl("precompute", "--run", run, "--force", *SMALL_SHARDS).status == 0
    undisturbed = shutil.copytree(run, tmp_path / "undisturbed")
    process = start("train-reduced", "--run", run, "--force", *changes)
    wait_for_step(run / ".student.new", 20, process)
    process.kill()
    resumed = mpl("train-reduced", "--run", run, *changes)
    assert resumed.status == 0, resumed.err
    assert "goes on" in resumed.err
    assert mpl("train-reduced", "--run", undisturbed, "--force", *changes).status == 0
    a, b = (load_file(path / "student" / "model.safetensors") for path in (run, undisturbed))
    assert all(a[name].equal(b[name]) for name in a)
