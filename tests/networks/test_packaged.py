"""A trained network that a package brings."""

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.networks.packaged import imagenet_names, is_packaged, load_packaged


def test_efficientnet_lite0_is_loaded_in_timms_order() -> None:
    """A picture of one colour is of no class for sure; the network's own statistics agree with its weights."""
    network = load_packaged("efficientnet-lite0@112")
    assert (network.image_size, len(network.class_names)) == (112, 1000)
    network.model.eval()
    with torch.inference_mode():
        logits = network.model(torch.zeros(2, 3, 112, 112))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    assert float(logits.abs().max()) < 30
    assert torch.equal(logits[0], logits[1])


def test_sizes_and_names() -> None:
    assert is_packaged("efficientnet-lite0")
    assert not is_packaged("efficientnet-lite4")
    for size in ("0", "x", "31", "99999"):
        with pytest.raises(UsageError, match="is no size"):
            load_packaged(f"efficientnet-lite0@{size}")
    names = imagenet_names()
    assert names[281].startswith("tabby")
    assert sum("[" in name for name in names) == 2  # two cranes
