"""Log-odds against float64, and decoding in order."""

from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, UsageError
from pipeline.log_odds import distributions, log_odds
from pipeline.pool.infer import infer_batches


def exact_log_odds(row):
    """Oracle in 50 digits: z_c - ln(sum of exp of the others)."""
    getcontext().prec = 50
    z = [Decimal(float(x)) for x in row]
    return [float(z[c] - sum((x.exp() for i, x in enumerate(z) if i != c), Decimal(0)).ln()) for c in range(len(z))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=12))
def test_log_odds_are_exact(row):
    found = log_odds(torch.tensor([row], dtype=torch.float32)).numpy()[0]
    np.testing.assert_allclose(found, exact_log_odds(row), rtol=1e-6, atol=1e-12)


def test_log_odds_where_one_minus_p_would_cancel():
    """A logit so high that its probability is 1 in float64: the order of such rows is still known."""
    found = log_odds(torch.tensor([[50.0, 0.0, 0.0], [60.0, 0.0, 0.0], [1e4, -1e4, 3.0]])).numpy()
    np.testing.assert_allclose(found[:2, 0], [50 - np.log(2), 60 - np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(found[2], [9997.0, -2e4, -9997.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_logit_makes_its_row_nan_and_no_other(bad):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    found = log_odds(logits).numpy()
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], -np.log(3), rtol=1e-6)


def test_one_class_has_no_odds():
    with pytest.raises(DataError, match="at least 2 classes"):
        log_odds(torch.zeros(3, 1))


@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=12))
def test_the_distribution_is_the_softmax(row):
    logits = torch.tensor([row], dtype=torch.float32)
    found = distributions(log_odds(logits).numpy())
    np.testing.assert_allclose(found, torch.softmax(logits.double(), dim=1).numpy(), rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)


def test_decoding_keeps_order_and_bad_entries(scorer, images_of, png):
    pixels = images_of(23, 0)
    files = [png(image) for image in pixels]
    files[3], files[8], files[16] = b"", b"not an image", files[16][:60]
    samples = [Sample(at, f"key-{at}", data) for at, data in enumerate(files)]
    inferred = list(infer_batches(samples, replace(scorer, threads=3), lambda pixels: len(pixels)))
    batches = [batch.decoded for batch in inferred]
    assert [len(batch.samples) for batch in batches] == [8, 8, 7]
    assert [sample.row for batch in batches for sample in batch.samples] == list(range(23))
    status = [status for batch in batches for status in batch.status]
    assert {at: status[at] for at in range(23) if status[at] != "ok"} == {
        3: "empty",
        8: "decode_error",
        16: "decode_error",
    }
    good = np.concatenate([batch.good + 8 * i for i, batch in enumerate(batches)])
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in batches]), pixels[good])
    assert len({bytes(h) for batch in batches for h in batch.hashes}) == 20
    assert [batch.more for batch in inferred] == [len(batch.good) for batch in batches]
    expected = log_odds(scorer.logits(pixels[good])).numpy()
    np.testing.assert_allclose(np.concatenate([batch.log_odds for batch in inferred]), expected, rtol=1e-5, atol=1e-5)


def test_an_error_of_the_stream_comes_through(scorer, images_of, png):
    def broken():
        yield Sample(0, "a", png(images_of(1, 0)[0]))
        raise DataError("cut short")

    with pytest.raises(DataError, match="cut short"):
        list(infer_batches(broken(), scorer))


def test_normalised_as_asked(scorer, images_of):
    pixels = images_of(5, 1)
    x = (pixels.astype(np.float64) / 255 - 0.5) / 0.25
    expected = x.transpose(0, 3, 1, 2).reshape(5, -1) @ scorer.model.weight.double().numpy().T
    np.testing.assert_allclose(scorer.logits(pixels).numpy(), expected, rtol=1e-4, atol=1e-4)
    rough = replace(scorer, precision="bfloat16").logits(pixels).numpy()
    assert 0 < np.abs(rough - expected).max() < 0.3


def test_another_number_of_classes_is_refused(scorer, images_of):
    with pytest.raises(DataError, match="has 3 classes"):
        replace(scorer, class_names=("a", "b", "c")).logits(images_of(2, 0))
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        replace(scorer, precision="half").logits(images_of(2, 0))
