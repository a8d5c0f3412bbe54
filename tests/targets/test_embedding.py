"""Embeddings beside distributions: their directions against scikit-learn, the store whole and killed, loaders."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError
from pipeline.pool.features import NetworkFeatures, last_layer_watched
from pipeline.pool.infer import Scorer, decode_batch
from pipeline.targets import TargetsStore
from pipeline.targets.build import Ingredients, precompute
from pipeline.targets.embedding import REDUCTION_FILE, Reduction, read_reduction
from pipeline.targets.manifest import StoreSettings
from pipeline.targets.store import joined
from pipeline.targets.stream import StreamedPool
from tests.targets.test_build import labelled, selected  # noqa: F401  (fixtures)

SETTINGS = StoreSettings(teacher="t", labelled="l", shard_rows=13, embedding=3)


@dataclass
class ByKey:
    """Eight numbers that a key stands for, of which three directions hold nearly all."""

    asked: list[str] = field(default_factory=list)

    def embed(self, split, shard, samples):
        self.asked.append(shard)
        return np.stack([self.of(shard, sample) for sample in samples])

    def of(self, shard: str, sample: Sample) -> np.ndarray:
        draw = np.random.default_rng([sample.row, *shard.encode()])
        scales = np.array([9, 5, 3, *[0.01] * 5])
        return (40 + draw.normal(size=8) * scales).astype(np.float32)

    def placed(self, worker, threads):
        return self

    def without_weights(self):
        return self


def run(folder, selected, labelled, scorer, **changes):  # noqa: F811
    shards, pool, selection = selected
    ingredients = Ingredients(selection, shards, labelled, scorer, pool, embedder=ByKey())
    return precompute(folder, ingredients, replace(SETTINGS, **changes), preprocessing={"size": 16})


def test_directions_are_the_principal_ones() -> None:
    """Oracle: scikit-learn, but for signs and one common scale."""
    raw = np.random.default_rng(0).normal(size=(200, 12)) @ np.diag(np.arange(12, 0, -1)) + 5
    found = Reduction.fit(raw, 4)
    pca = PCA(4).fit(raw)
    e, expected = found(raw), pca.transform(raw)
    scale = np.abs(e / expected)
    np.testing.assert_allclose(scale, scale[0, 0], rtol=1e-6)
    assert np.square(e).mean() == pytest.approx(1)
    assert found.numbers == 4
    assert Reduction.fit(raw[:3], 64).numbers == 2  # three images span two directions
    with pytest.raises(DataError, match="do not differ"):
        Reduction.fit(np.ones((5, 3)), 2)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_the_store_holds_the_embedding_of_every_image(selected, labelled, scorer, tmp_path, format) -> None:  # noqa: F811
    run(tmp_path / "targets", selected, labelled, scorer, format=format)
    store = TargetsStore.open(tmp_path / "targets")
    assert store.embedding == 3
    reduction = read_reduction(tmp_path / "targets" / REDUCTION_FILE, store.fingerprint)
    assert reduction is not None
    by_key = ByKey()
    images = list(store.samples())
    raw = np.stack([by_key.of(shard, sample) for shard, sample in images])
    np.testing.assert_allclose(store.embeddings(), reduction(raw), atol=4e-3)
    assert np.square(store.embeddings()).mean() == pytest.approx(1, rel=0.01)
    known = store.labelled()
    assert known.embeddings.shape == (8, 3)  # one of nine does not decode
    raw = np.stack([by_key.of("train", Sample(row, "", b"")) for row in known.row.tolist()])
    np.testing.assert_allclose(known.embeddings, reduction(raw), atol=4e-3)
    drawn = []
    with StreamedPool(store, 16, workers=0) as pool:
        for step in range(sum(store.uses().tolist())):
            drawn.append(pool.draw(0, step, 1)[1].numpy()[0])
    rows = {row.tobytes() for row in joined(store.distributions(), store.embeddings())}
    assert {row.tobytes() for row in drawn} == rows


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file open
def test_plain_webdataset_reads_it(selected, labelled, scorer, tmp_path) -> None:  # noqa: F811
    import webdataset

    run(tmp_path / "targets", selected, labelled, scorer, format="webdataset")
    store = TargetsStore.open(tmp_path / "targets")
    tars = [str(path) for path in sorted((tmp_path / "targets").glob("pool-*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    assert [sample["json"]["key"] for sample in samples] == store.keys()
    found = np.stack([sample["embedding.npy"] for sample in samples])
    np.testing.assert_array_equal(found.astype(np.float32), store.embeddings())


def test_without_it_the_store_is_as_it_was(selected, labelled, scorer, tmp_path) -> None:  # noqa: F811
    shards, pool, selection = selected
    plain = replace(SETTINGS, embedding=None)
    precompute(tmp_path / "targets", Ingredients(selection, shards, labelled, scorer, pool), plain, preprocessing={})
    store = TargetsStore.open(tmp_path / "targets")
    assert "embedding" not in store.manifest
    assert (store.embedding, store.embeddings().shape, store.labelled().embeddings.shape) == (
        0,
        (store.count, 0),
        (8, 0),
    )
    q = store.distributions()
    assert joined(q, store.embeddings()) is q


def test_what_was_found_before_a_kill_is_used_after_it(selected, labelled, scorer, tmp_path, monkeypatch) -> None:  # noqa: F811
    run(tmp_path / "whole", selected, labelled, scorer)

    class Killed(Exception):
        pass

    def dies(*arguments: object) -> None:
        raise Killed

    monkeypatch.setattr("pipeline.targets.build.write_labelled", dies)
    with pytest.raises(Killed):
        run(tmp_path / "killed", selected, labelled, scorer)
    monkeypatch.undo()
    monkeypatch.setattr(Reduction, "fit", dies)  # not a second time
    run(tmp_path / "killed", selected, labelled, scorer)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_a_networks_own_is_what_its_last_layer_sees(make_shards) -> None:
    """Oracle: timm's own way to ask for it; threads do not mix their batches."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    scorer = Scorer(model, tuple("abcd"), 16, (0.5,) * 3, (0.5,) * 3, batch=4, threads=2)
    samples = list(make_shards([22])[0].read())
    found = NetworkFeatures(scorer).embed("unlabelled", "s", samples)
    pixels = torch.from_numpy(decode_batch(samples, 16).pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    broken = [*samples[:2], samples[2]._replace(data=b"no image")]
    with pytest.raises(DataError, match=r"shard s row 2 .* does not decode, and has no embedding"):
        NetworkFeatures(scorer).embed("unlabelled", "s", broken)
    without = replace(scorer, model=torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    with pytest.raises(DataError, match="last linear layer"), last_layer_watched(without):
        pass


def test_no_labelled_image_at_all(selected, scorer, tmp_path) -> None:  # noqa: F811
    run(tmp_path / "targets", selected, [("train", Sample(0, "", b"no image"))], scorer)
    assert TargetsStore.open(tmp_path / "targets").labelled().embeddings.shape == (0, 3)
