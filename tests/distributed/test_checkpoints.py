"""Saved on some number of processes in one layout, gone on with on another; killed and gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import Checkpoints
from pipeline.distributed import checkpoint
from pipeline.distributed.layouts import Layout
from pipeline.distributed.ranks import ALONE, Ranks
from pipeline.errors import CheckpointError
from tests.distributed.training import Training
from tests.distributed.worlds import free_port, in_ranks, results
from tests.processes import LIMIT, ended

pytestmark = pytest.mark.xdist_group("distributed")

ROOT = Path(__file__).parents[2]
SHARDED, HYBRID = Layout("sharded"), Layout("hybrid", shard_size=2)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol / 1e3, msg=lambda m, n=name: f"{n}: {m}")


def begin(ranks: Ranks, folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Two steps and a checkpoint, in each layout; all tensors as they were saved."""
    saved = {}
    for name, layout in {"replicated": Layout(), "sharded": SHARDED, "hybrid": HYBRID}.items():
        training = Training(ranks, folders[name], layout).run(2, every=1)
        saved[name] = training.tensors()
    return saved


def go_on(ranks: Ranks, folders: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """What another layout finds in each, and two more steps."""
    found = {}
    for name, layout in {"replicated": SHARDED, "sharded": Layout(), "hybrid": SHARDED, "file": SHARDED}.items():
        training = Training(ranks, folders[name], layout).restore()
        assert training.at == 2
        found[f"{name} read"] = training.tensors()
        found[f"{name} on"] = training.run(4).tensors()
    return found


def test_saved_on_four_and_gone_on_with_two_and_with_one(tmp_path: Path) -> None:
    """Also from a single process's file. What is read is what was saved, bit for bit; then the steps agree."""
    folders = {name: tmp_path / name for name in ("replicated", "sharded", "hybrid", "file")}
    saved = results(in_ranks(4, begin, folders))[0]
    saved["file"] = Training(ALONE, folders["file"]).run(2, every=2).tensors()
    undisturbed = Training(ALONE, tmp_path / "none").run(4).tensors()
    two = results(in_ranks(2, go_on, folders))
    for name, folder in folders.items():
        alone = Training(ALONE, folder).restore()
        for tensors in (alone.tensors(), *(found[f"{name} read"] for found in two)):
            close(tensors, saved[name], rtol=0)
        for tensors in (alone.run(4).tensors(), *(found[f"{name} on"] for found in two)):
            close(tensors, undisturbed, rtol=1e-5)  # finite differences where it is sharded


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """On all ranks alike, whoever saw the damage; with none left, an error."""
    folder = tmp_path / "c"
    results(in_ranks(2, three_steps, folder))
    entries = json.loads((folder / "index.json").read_text())["checkpoints"]
    assert [e["step"] for e in entries] == [2, 3]
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "step-00000002", "step-00000003"]
    part = folder / entries[1]["file"] / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    for at, warnings in results(in_ranks(2, restored, folder)):
        assert at == 2
        assert len(warnings) == 1
        assert "checksum" in warnings[0]
    (folder / entries[0]["file"] / ".metadata").unlink()
    for found in in_ranks(2, restored, folder):
        assert isinstance(found, CheckpointError)
        assert ".metadata is missing" in str(found)


def three_steps(ranks: Ranks, folder: Path) -> int:
    return Training(ranks, folder).run(3, every=1).at


def restored(ranks: Ranks, folder: Path, identity: str = "this") -> tuple[int, list[str]]:
    training = Training(ranks, folder, identity=identity).restore()
    return training.at, training.warnings


def restored_where_rank_1_cannot_read(ranks: Ranks, folder: Path) -> tuple[int, list[str]]:
    """Rank 1 alone cannot open the description of the newest checkpoint."""
    original = checkpoint.stored_tensors

    def stored_tensors(path: Path) -> dict:
        if ranks.rank == 1 and path.name == "step-00000003":
            raise CheckpointError(f"{path} cannot be read: stale file handle")
        return original(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "stored_tensors", stored_tensors)
        return restored(ranks, folder)


def test_a_description_that_one_rank_cannot_read(tmp_path: Path) -> None:
    """No rank begins to read the tensors, in which all take part."""
    results(in_ranks(2, three_steps, tmp_path))
    for at, warnings in results(in_ranks(2, restored_where_rank_1_cannot_read, tmp_path)):
        assert at == 2
        assert len(warnings) == 1
        assert "rank 1: " in warnings[0]
        assert "stale file handle" in warnings[0]


def test_of_another_training_or_network(tmp_path: Path) -> None:
    Training(ALONE, tmp_path).run(1, every=1)
    with pytest.raises(CheckpointError, match="another training"):
        restored(ALONE, tmp_path, "that")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"another network or optimiser: average/.* more differ"):
        Checkpoints(tmp_path, "this").restore_networks({"student": (other, None)})


def test_no_code_is_unpickled(tmp_path: Path) -> None:
    """A description of tensors that names a function is refused before it is called."""
    import pickle

    from pipeline.distributed.checkpoint import read_shards, stored_tensors, write_shards

    write_shards(tmp_path, {"a": torch.arange(3.0)}, ALONE)
    into = {"a": torch.zeros(3)}
    read_shards(tmp_path, into, ALONE)
    assert into["a"].tolist() == [0, 1, 2]
    assert stored_tensors(tmp_path) == {"a": (torch.Size([3]), torch.float32)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(CheckpointError, match=r"posix.getcwd"):
        stored_tensors(tmp_path)


@pytest.mark.long  # begun again by hand: tests/stages/test_torchrun.py
@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_worker_changes_nothing(tmp_path: Path, processes: int) -> None:
    """torchrun starts all again; they go on from the last checkpoint, and end where nobody was killed.

    To rounding: after its first step DDP orders its messages anew, so sums are rounded otherwise.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--max-restarts=3"]
    torchrun.append(f"--nproc-per-node={processes}")
    script = [f"--master-port={free_port()}", "-m", "tests.distributed.training", str(tmp_path), "6", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    agent = subprocess.Popen([*torchrun, *script], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    with ended(agent):
        err = agent.communicate(timeout=LIMIT)[1][-3000:]
    assert agent.returncode == 0, err
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert found["started_at"] == 4, err
    undisturbed = results(in_ranks(processes, undisturbed_run, tmp_path / "other"))[0]
    close(found["tensors"], undisturbed, rtol=1e-12)


def undisturbed_run(ranks: Ranks, folder: Path) -> dict[str, torch.Tensor]:
    return Training(ranks, folder).run(6, every=2).tensors()
