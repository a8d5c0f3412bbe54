"""What ranks tell each other, and what they say of one that does not come."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.batches import require_batch
from pipeline.distributed import launch, ranks
from pipeline.distributed.layouts import Layout, lay_out, mesh_of, prepare
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.errors import DataError, FeedbackError, NonFiniteError, RanksError, RunError, UsageError
from pipeline.evaluate import predict_logits
from pipeline.student import Student
from tests.distributed.checks import Case, train
from tests.distributed.worlds import CPU, in_ranks, results

pytestmark = pytest.mark.xdist_group("distributed")


def together(these: Ranks) -> dict[str, Any]:
    """Everything that three ranks agree on, one after another."""
    r = these.rank
    a, b = torch.full((3,), float(r)), torch.full((2, 2), float(r), dtype=torch.float64).t()
    ranks.BUCKET = 20  # bytes: several messages
    these.mean_([a, b, a])
    return {
        "mean": (a, b, these.mean(torch.tensor(float(r)))),
        "every": these.every(r / 7),
        "texts": these.texts("θ" * r),
        "agree": (these.agree(True), these.agree(r != 1)),
        "recipe": raised(lambda: these.check_same("the recipe", "b" if r == 2 else "a")),
        "same": raised(lambda: these.check_same("the recipe", "a")),
        "together": raised(lambda: these.raise_together(DataError("shard 7 is gone") if r else None)),
        "none": raised(lambda: these.raise_together(None)),
        "share": raised(lambda: these.share(8, "train_mpl.batch")),
        "shards": raised(lambda: mesh_of(Layout("hybrid", shard_size=2), these, CPU)),
        "logits": logits_of_ten_images(these),
        "exact": raised(lambda: train(these, Case(Layout("sharded"), batch=3))),
        "non-finite": non_finite_on_rank_1(these),
    }


def logits_of_ten_images(these: Ranks) -> tuple[torch.Tensor, int]:
    """(of a network that gives an image's values themselves, how many images this rank has put through it)."""
    seen = []
    network = nn.Flatten()
    network.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    pixels = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    found = predict_logits(network, pixels, (0.0,) * 3, (1.0,) * 3, batch=3, device=CPU, ranks=these)
    return found, sum(seen)


def non_finite_on_rank_1(these: Ranks) -> tuple[Any, bool]:
    """(what is raised, whether the weights are as before)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    student = Student(lay_out(network, Layout(), these), torch.optim.SGD(network.parameters(), lr=0.1), ranks=these)
    before = network[1].weight.detach().clone()
    images = torch.randn(2, 3, 2, 2)
    if these.rank == 1:
        images[0, 0, 0, 0] = float("nan")
    error = raised(lambda: student.learn(images, torch.full((2, 3), 1 / 3)))
    return error, torch.equal(network[1].weight, before)


def raised(work: Any) -> tuple[str, str] | None:
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_what_ranks_agree_on() -> None:
    for found in results(in_ranks(3, together)):
        a, b, mean = found["mean"]
        # `a` stands twice in the list: averaged, and the average averaged again
        torch.testing.assert_close((a, b), (torch.ones(3), torch.ones(2, 2, dtype=torch.float64)))
        assert float(mean) == 1
        assert found["every"] == [0.0, 1 / 7, 2 / 7]
        assert found["texts"] == ["", "θ", "θθ"]
        assert found["agree"] == (True, False)
        kind, text = found["recipe"]
        assert kind == UsageError.__name__
        assert "disagree on the recipe: rank 2 (of 3)" in text
        assert found["same"] is found["none"] is None
        assert found["together"] == (DataError.__name__, "ranks 1, 2: shard 7 is gone")
        kind, text = found["share"]
        assert kind == UsageError.__name__
        assert "train_mpl.batch (=8) must be a multiple of the number of processes (=3); set it to 6 or 9" in text
        assert "shard_size (=2) must divide the number of processes (=3)" in found["shards"][1]
        logits, seen = found["logits"]
        torch.testing.assert_close(logits, (torch.arange(10.0) / 255)[:, None].expand(-1, 3))
        assert seen == 4  # of ten, on each of three
        kind, text = found["exact"]
        assert kind == FeedbackError.__name__
        assert "'central'" in text
        assert "'hard'" in text
        (kind, text), untouched = found["non-finite"]
        assert (kind, text) == (NonFiniteError.__name__, "the student's loss at its step 1 is nan on rank 1")
        assert untouched


def test_a_rank_that_never_starts_is_named() -> None:
    found = in_ranks(3, together, timeout=3, absent=2)
    for error in found:
        assert isinstance(error, RanksError)
    assert "of 3 processes 2 came within 3 s; missing: 2" in str(found[0])


def test_no_rank_0() -> None:
    error = in_ranks(2, together, timeout=3, absent=0)[0]
    assert isinstance(error, RanksError)
    assert "rank 0 is missing" in str(error)


def trouble(these: Ranks, where: str, what: str) -> None:
    """Rank 1 of three does not take part in a collective: it hangs, or it dies."""
    ranks.REPORT = 5.0
    if where == "backward":
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        model = lay_out(network, Layout(), these)
        student = Student(model, torch.optim.SGD(network.parameters(), lr=0.1), ranks=these)
    if these.rank == 1:
        if what == "dies":
            os._exit(9)
        time.sleep(600)
    if where == "barrier":
        these.barrier("the end")
    elif where == "agreement":
        these.every(1.0)
    else:
        student.learn(torch.randn(2, 3, 2, 2), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("barrier", "hangs"),
        ("agreement", "dies"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("barrier", "dies"), ("backward", "hangs"))),
    ],
)
def test_a_rank_that_does_not_come_is_named(where: str, what: str) -> None:
    """On rank 0, within the timeout and the time that the others have to report."""
    error = in_ranks(3, trouble, where, what, timeout=5, of_first=True)[0]
    assert isinstance(error, RanksError)
    assert "rank 1 of 3 did not take part" in str(error)
    assert ("the end" in str(error)) == (where == "barrier")


def one_of_a_hybrid_group_hangs(these: Ranks) -> None:
    mesh = mesh_of(Layout("hybrid", shard_size=2), these, CPU)
    if these.rank == 1:
        time.sleep(600)
    dist.all_reduce(torch.ones(1), group=mesh.get_group("shard"))


def test_groups_of_a_hybrid_layout_wait_no_longer_than_all() -> None:
    error = in_ranks(4, one_of_a_hybrid_group_hangs, timeout=5, of_first=True)[0]
    assert isinstance(error, RuntimeError)
    assert ranks._of_a_collective(error)


def alone_in_trouble(these: Ranks, error: Exception) -> None:
    """Rank 1 meets something, while the others are in a collective or on their way to one."""
    if these.rank == 1:
        raise error
    these.mean(torch.ones(1))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            RunError("cannot write x: No space left on device"),
            RunError,
            "rank 1: cannot write x: No space left on device",
        ),
        (KeyError("a defect"), RanksError, "rank 1: KeyError: 'a defect'"),
    ],
    ids=["person", "defect"],
)
def test_what_one_rank_meets_is_said_by_the_others(error: Exception, kind: type, text: str) -> None:
    first, second, third = in_ranks(3, alone_in_trouble, error)
    assert type(second) is type(error)
    assert str(second) == str(error)
    for other in (first, third):
        assert type(other) is kind
        assert str(other) == text
        assert other.shared


def test_errors_that_all_raise_are_marked() -> None:
    """So that rank 0 alone prints them."""
    assert NonFiniteError("the loss is nan").shared
    assert not DataError("gone").shared
    sharded = Ranks(0, 2)
    for refused in (lambda: sharded.share(3, "batch"), lambda: require_batch(9, 8, "batch", "images", sharded)):
        with pytest.raises((UsageError, DataError)) as raised_error:
            refused()
        assert raised_error.value.shared


def test_a_timeout_of_gloo_is_one_of_a_collective() -> None:
    assert ranks._of_a_collective(RuntimeError("Application timeout caused pair closure"))
    assert not ranks._of_a_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_alone_needs_no_process_group() -> None:
    assert launch.start(CPU, environment={}) is ALONE
    assert launch.start(CPU, environment={"WORLD_SIZE": "1", "RANK": "0"}) is ALONE
    value = torch.tensor(2.0)
    assert ALONE.mean(value) is value
    ALONE.mean_([value])
    ALONE.barrier("the end")
    assert (ALONE.every(0.5), ALONE.texts("a"), ALONE.agree(False), ALONE.share(7, "b")) == ([0.5], ["a"], False, 7)
    with pytest.raises(DataError, match=r"^gone$"):
        ALONE.raise_together(DataError("gone"))
    assert not dist.is_initialized()


def test_a_normalisation_that_cannot_be_synchronised_is_named() -> None:
    network = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4))
    with pytest.raises(UsageError, match="1 is a BatchNorm3d"):
        prepare(network, Layout(sync_batch_norm=True), Ranks(0, 2))


def test_environments_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 4, but RANK is not set.*torchrun"):
        launch.start(CPU, environment={"WORLD_SIZE": "4"})
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"process 2 of this node.*there are 2 \(cuda\).*--nproc-per-node=2"):
        launch.device_of_this_rank(cuda, {"WORLD_SIZE": "4", "LOCAL_RANK": "2"})
    assert launch.device_of_this_rank(cuda, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == torch.device("cuda", 1)
    assert launch.device_of_this_rank(CPU, {"WORLD_SIZE": "4", "LOCAL_RANK": "9"}) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=r"^no cuda device is here for process 0 of this node; use --device cpu$"):
        launch.device_of_this_rank(cuda, {"WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no cuda device is here"):
        launch.backend_of(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_backend_available", lambda name: False)
    with pytest.raises(UsageError, match=r"nccl, which this torch .* was built without"):
        launch.backend_of(cuda)
    with pytest.raises(UsageError, match="not on mps"):
        launch.backend_of(torch.device("mps"))


def leave(these: Ranks) -> tuple[bool, bool]:
    group = dist.group.WORLD
    launch.leave(these)
    return any(kept is group for kept in launch.KEPT), dist.is_initialized()


def test_groups_that_were_left_are_not_freed() -> None:
    """Freeing one can wait for its threads while these wait for Python."""
    assert results(in_ranks(2, leave)) == [(True, False)] * 2
