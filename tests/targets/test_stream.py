"""The streamed pool: its order against a plain account, its batches against the images that were stored."""

import io
import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

from pipeline.batches import Batches, ImageSets, Mixture
from pipeline.config import ModelSettings, OptimizerSettings, TrainSettings
from pipeline.data.order import StreamOrder, file_order
from pipeline.data.sets import LabelledSet, PoolSet
from pipeline.errors import DataError, TargetsError
from pipeline.networks.network import build_network
from pipeline.seeds import permutation
from pipeline.storage.tables import fixed_binary
from pipeline.targets import TargetsStore
from pipeline.targets import stream as stream_module
from pipeline.targets.files import labelled_schema, pool_schema, write_pool_file, write_targets
from pipeline.targets.manifest import Origin, write_manifest
from pipeline.targets.stream import StreamedPool
from pipeline.teachers import FixedTargets
from pipeline.training import Interrupted, Journal, Training

SIZE = 4
FORMATS = ("parquet", "webdataset")
ROWS = (7, 1, 6, 7)  # of each file
COUNT = sum(ROWS)
CPU, HALF = torch.device("cpu"), (0.5, 0.5, 0.5)


def repeats(count, file):
    return np.random.RandomState(file).choice([1, 1, 2, 3], count)


def write_pool(folder, rows=ROWS, format="parquet", images=None, dtype="float16"):
    """A pool whose image i is of the one colour (i, 2·i, 255 − i) and whose first class has (1 + i) / (2 + i)."""
    begin = 0
    for file, count in enumerate(rows):
        ids = np.arange(begin, begin + count)
        q = np.stack([(1 + ids) / (2 + ids), 1 / (2 + ids)], axis=1)
        encoded = [encode(i) if images is None else images(i) for i in ids]
        table = pa.table(
            {
                "key": [f"key{i}" for i in ids],
                "shard": [f"s{i % 3}" for i in ids],
                "row": ids,
                "image": pa.array(encoded, pa.large_binary()),
                "distribution": fixed_binary(q.astype(dtype)),
                "classes": pa.array([[0]] * count, pa.list_(pa.int32())),
                "repeat": repeats(count, file),
            }
        )
        write_pool_file(folder, file, table.cast(pool_schema(2, dtype)), "f", format)
        begin += count
    nothing = pa.table({name: [] for name in ("key", "shard", "row", "label", "distribution")})
    write_targets(folder / "labelled-00000.parquet", nothing.cast(labelled_schema(2, dtype)), "f")
    write_manifest(folder, Origin("f", "t", ("a", "b"), dtype, {}), {})
    return TargetsStore.open(folder)


def encode(i):
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (i, 2 * i, 255 - i)).save(buffer, "PNG")
    return buffer.getvalue()


def ids_of(drawn):
    """Which images were drawn; pixels and distributions must say the same."""
    pixels, q = drawn
    assert pixels.dtype == torch.uint8
    assert pixels.shape[1:] == (3, SIZE, SIZE)
    ids = pixels[:, 0, 0, 0].long()
    assert torch.equal(pixels, torch.stack([ids, 2 * ids, 255 - ids], 1)[:, :, None, None].expand_as(pixels))
    torch.testing.assert_close(q[:, 0], (1 + ids) / (2 + ids), atol=5e-4, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(len(q)))
    return ids.tolist()


@pytest.fixture(params=FORMATS)
def store(request, tmp_path):
    return write_pool(tmp_path, format=request.param)


# -- the order


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 2**40), st.integers(0, 3))
def test_a_row_comes_as_often_as_it_counts_and_never_twice_in_a_row(repeat, seed, epoch):
    order = file_order(np.array(repeat), seed, epoch, 0)
    assert Counter(order.tolist()) == dict(enumerate(repeat))
    if max(repeat) <= (sum(repeat) + 1) // 2:  # otherwise it cannot be helped
        assert all(a != b for a, b in pairwise(order.tolist()))


def test_repeats_are_spread_over_the_file():
    """Two uses of one row are half a file apart, not in one batch; others come in between."""
    order = file_order(np.full(5000, 2), 0, 0, 0)
    places = np.argsort(order, kind="stable").reshape(5000, 2)
    apart = places[:, 1] - places[:, 0]
    assert apart.min() > 4000
    assert abs(apart.mean() - 5000) < 50


def test_orders_of_rows_are_uniform():
    """Every row comes first about equally often: 6,000 epochs of 6, within five standard deviations."""
    first = Counter(int(file_order(np.ones(6, np.int64), 0, epoch, 0)[0]) for epoch in range(6000))
    assert all(abs(count - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for count in first.values())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(0, 2**40), st.data())
def test_pieces_are_parts_of_one_sequence_of_epochs(uses, seed, data):
    """Oracle: all uses of three epochs written out, one file after another."""
    order = StreamOrder(uses, seed)
    whole = [
        (epoch, int(file), at)
        for epoch in range(3)
        for file in permutation(len(uses), seed, "order", "stream", epoch)
        for at in range(uses[file])
    ]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    pieces = order.pieces(start, stop)
    assert [(p.epoch, p.file, at) for p in pieces for at in range(p.begin, p.end)] == whole[start:stop]
    if pieces and (after := start + next_place(whole[start:], pieces[0])) < len(whole):
        assert order.next_file(pieces[0]) == whole[after][1]


def next_place(sequence, piece):
    """Uses before the first of another file or epoch."""
    return next((i for i, (e, f, _) in enumerate(sequence) if (e, f) != (piece.epoch, piece.file)), len(sequence))


def test_what_cannot_be_drawn():
    for uses, start, stop in (([0, 0], 0, 1), ([3], 2, 1), ([3], -1, 1)):
        with pytest.raises(DataError, match="cannot be drawn"):
            StreamOrder(uses, 0).pieces(start, stop)


# -- the pool


def test_every_image_comes_as_often_as_it_counts_in_every_epoch(store):
    """Batches that divide no epoch; epochs, seeds and nothing else differ."""
    uses = dict(enumerate(np.concatenate([repeats(n, file) for file, n in enumerate(ROWS)]).tolist()))
    length = sum(uses.values())
    with StreamedPool(store, SIZE, workers=1) as pool:
        assert len(pool) == COUNT
        sequence = [i for step in range(2 * length // 5 + 1) for i in ids_of(pool.draw(0, step, 5))]
        other = [i for step in range(length // 5) for i in ids_of(pool.draw(1, step, 5))]
    epochs = [sequence[:length], sequence[length : 2 * length]]
    assert all(Counter(epoch) == uses for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sequence[: len(other)] != other


def test_an_epoch_is_files_in_the_order_of_the_seed(store):
    """Oracle: the files' orders, laid one behind the other by hand."""
    begins = np.cumsum([0, *ROWS])
    expected = [
        int(begins[file] + row)
        for file in permutation(len(ROWS), 5, "order", "stream", 0)
        for row in file_order(repeats(ROWS[file], file), 5, 0, int(file))
    ]
    with StreamedPool(store, SIZE, workers=0) as pool:
        assert ids_of(pool.draw(5, 0, len(expected))) == expected


def test_formats_workers_and_dtype_give_one_sequence(tmp_path):
    """And so does the number that any of them draws ahead."""
    found = []
    for format in FORMATS:
        write_pool(tmp_path / format, format=format)
        for workers in (0, 1, 3):
            with StreamedPool(TargetsStore.open(tmp_path / format), SIZE, workers=workers) as pool:
                found.append([pool.draw(3, step, 8) for step in range(12)])
    for other in found[1:]:
        for (pixels, q), (expected, q_expected) in zip(other, found[0], strict=True):
            assert torch.equal(pixels, expected)
            assert torch.equal(q, q_expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_in_object_storage_streams_alike(tmp_path, format):
    place = UPath(f"memory:///{tmp_path.name}")
    write_pool(place, format=format)
    write_pool(tmp_path, format=format)
    found = []
    for folder in (tmp_path, place):
        with StreamedPool(TargetsStore.open(folder), SIZE, workers=2) as pool:
            found.append([ids_of(pool.draw(0, step, 9)) for step in range(8)])
    place.fs.rm(place.path, recursive=True)
    assert found[0] == found[1]


def test_any_step_from_any_state_is_the_same(store):
    with StreamedPool(store, SIZE, workers=2) as pool:
        in_turn = [ids_of(pool.draw(0, step, 6)) for step in range(30)]
        for step in (17, 3, 3, 4, 29, 0, 28, 29):
            assert ids_of(pool.draw(0, step, 6)) == in_turn[step]
        assert ids_of(pool.draw(0, 2, 12)) == in_turn[4] + in_turn[5]
    for step in (29, 11):
        with StreamedPool(store, SIZE, workers=1) as fresh:
            assert ids_of(fresh.draw(0, step, 6)) == in_turn[step]


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_ranks_make_up_the_batch(store, ranks):
    with StreamedPool(store, SIZE, workers=1) as pool:
        whole = [ids_of(pool.draw(0, step, 12)) for step in range(6)]
    for rank in range(ranks):
        part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        with StreamedPool(store, SIZE, workers=1) as pool:
            assert [ids_of(pool.draw(0, step, 12, part)) for step in range(6)] == [ids[part] for ids in whole]


def test_a_rank_decodes_its_slice_alone(store, monkeypatch):
    decoded = []
    work = stream_module.TrainingShard.take
    monkeypatch.setattr(
        stream_module.TrainingShard, "take", lambda shard, rows: decoded.extend(rows) or work(shard, rows)
    )
    with StreamedPool(store, SIZE, workers=0) as pool:
        for step in range(4):
            pool.draw(0, step, 12, slice(3, 6))
    assert len(decoded) == 4 * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_two_training_shards_are_in_memory_at_most(tmp_path, monkeypatch, workers):
    """Whatever is drawn; and each is read once an epoch, in turn, and by a resumed run from where it stands."""
    store = write_pool(tmp_path, rows=(5,) * 12)
    alive, most, reads = weakref.WeakSet(), [], []
    read = stream_module.read_shard

    def counting(store, file):
        most.append(len(alive))
        reads.append(file)
        shard = read(store, file)
        alive.add(shard)
        return shard

    monkeypatch.setattr(stream_module, "read_shard", counting)
    length = int(store.uses().sum())
    with StreamedPool(store, SIZE, workers=workers) as pool:
        for step in range(length // 3):
            pool.draw(0, step, 3)
            assert len(alive) <= 2
        assert 12 <= len(reads) <= 12 + 4 * workers  # those of the next epoch's beginning are read ahead
        for step in (9, 0, 14):
            pool.draw(0, step, 3)
    assert max(most) <= 2
    assert len(alive) == 0
    reads.clear()
    with StreamedPool(store, SIZE, workers=0) as pool:
        pool.draw(0, length // 2, 1)
    assert len(reads) == 1


# -- what goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_no_longer_decodes_is_named(tmp_path, workers):
    store = write_pool(tmp_path, images=lambda i: b"not an image" if i == 10 else encode(i))
    says = r"pool-00002.parquet: row 2 \(shard s1 row 10, key10\) no longer decodes: decode_error, not an image"
    with StreamedPool(store, SIZE, workers=workers) as pool, pytest.raises(TargetsError, match=says):
        pool.draw(0, 0, int(store.uses().sum()))


def test_a_file_that_changes_meanwhile_is_named(store):
    for path in store.folder.glob("pool-0000*"):
        path.write_bytes(path.read_bytes()[:-100])
    with StreamedPool(store, SIZE, workers=1) as pool, pytest.raises(TargetsError, match=r"pool-0000\d.*damaged"):
        pool.draw(0, 0, COUNT)


# -- the student


class Observer:
    """Asks to stop after a number of steps."""

    def __init__(self, steps=None):
        self.steps, self.notes = steps, []

    def note(self, text):
        self.notes.append(text)

    def progress(self, done, total, values):
        self.done = done

    def stop_requested(self):
        return self.steps == self.done


def train(folder, store, observer):
    """Six steps of a small student on pool and labelled images; its weights."""
    options = TrainSettings(steps=6, batch=8, optimizer=OptimizerSettings(lr=0.05), ema_decay=0.5)
    labelled = LabelledSet(torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 2)
    with StreamedPool(store, SIZE, workers=1) as pool:
        batches = Batches(ImageSets(labelled, pool, HALF, HALF), Mixture(2, 6), seed=1)
        torch.manual_seed(0)
        network = build_network(ModelSettings(name="wrn_10_1"), ["a", "b"], SIZE, HALF, HALF)
        journal = Journal(folder, "test", observer)
        training = Training(network.model, FixedTargets(), batches, options, journal)
        training.run()
    return training.averaged_state()


def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(tmp_path):
    store = write_pool(tmp_path / "targets")
    wanted = train(tmp_path / "undisturbed", store, Observer())
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", store, Observer(3))
    resumed = Observer()
    found = train(tmp_path / "stopped", store, resumed)
    assert resumed.notes == ["goes on from step 3 of 6"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_in_memory_and_streamed_pools_answer_alike(store):
    """The other implementation of the protocol: same uses, slices too, in an order of its own."""
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(data)))) for data in store.images()])
    whole = PoolSet(
        pixels.permute(0, 3, 1, 2), torch.from_numpy(store.repeats()), torch.from_numpy(store.distributions())
    )
    length = int(store.uses().sum())
    with StreamedPool(store, SIZE, workers=0) as streamed:
        assert len(whole) == len(streamed)
        a, b = ids_of(whole.draw(0, 0, length)), ids_of(streamed.draw(0, 0, length))
    assert sorted(a) == sorted(b)
    assert a != b
    assert ids_of(whole.draw(0, 2, 8, slice(2, 6))) == ids_of(whole.draw(0, 2, 8))[2:6]
