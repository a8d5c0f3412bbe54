"""`mpl train-mpl` in several processes: the same update, the same message, and it goes on when one dies."""

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage.metrics import read_metrics
from tests.distributed.worlds import free_port
from tests.processes import LIMIT, ended
from tests.stages.commands import ROOT, Command, start, wait_for_step
from tests.stages.test_train_mpl import TINY

pytestmark = pytest.mark.xdist_group("torchrun")
NETWORK = "{name: test_vit, options: {patch_size: 2}}"  # no batch statistics, no dropout


@pytest.fixture(scope="module")
def vit_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.yaml"
    tiny = (
        TINY.replace("{name: wrn_10_1, dropout: 0.1}", NETWORK)
        .replace("lr: 0.01", "lr: 0.001")
        .replace("threshold: 0.1", "threshold: 0.0")
    )
    path.write_text(recipe.read_text() + tiny + "  evaluate_every: 6\ndistributed: {timeout_seconds: 600}\n")
    return path


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> AbstractContextManager[subprocess.Popen[str]]:
    """`mpl ARGUMENTS` under torchrun; all of them end with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", "-m", "--", "stages", *map(str, arguments)]  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MPL_")} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables
    )
    return ended(process)


def finish(process: subprocess.Popen[str]) -> str:
    """Standard error of a process that succeeds."""
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return err


def same(a: Path, b: Path) -> None:
    """Weights of student and teacher, and the log, to float32's rounding."""
    for network in ("student", "student/teacher"):
        left, right = (load_file(run / network / "model.safetensors") for run in (a, b))
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-4, msg=name)
    rows = [read_metrics(run / "student/metrics.csv") for run in (a, b)]
    for x, y in zip(*rows, strict=True):
        assert float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-3)
        assert float(x["teacher_loss"]) == pytest.approx(float(y["teacher_loss"]), rel=1e-3)
    assert float(x["validation_nll"]) == pytest.approx(float(y["validation_nll"]), rel=1e-3)


@pytest.mark.long  # a killed worker's two do too
def test_two_processes_train_as_one(mpl, vit_recipe, tmp_path) -> None:
    """Also where the two share a file of decoded images, and the one has them in memory."""
    soft = "train_mpl.feedback=soft"
    assert mpl("train-mpl", "--recipe", vit_recipe, "--run", tmp_path / "one", "--set", soft).status == 0
    changes = [soft, "data.memory_gib=1.0e-6"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "two", changes, changes)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert (first[1] + second[1]).count("train-mpl: starts") == 1
    assert not (tmp_path / "two/decoded").exists()
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.long  # their steps: tests/distributed/test_layouts.py
def test_two_processes_that_hold_shards_train_as_one(mpl, vit_recipe, tmp_path) -> None:
    changes = ["train_mpl.feedback=hard", "data.memory_gib=1.0e-6"]
    options = ["--recipe", vit_recipe, "--run", tmp_path / "one", "--set", changes[0]]
    assert mpl("train-mpl", *options).status == 0
    sharded = [*changes, "distributed.layout=sharded"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "two", sharded, sharded)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert not (tmp_path / "two/decoded").exists()
    same(tmp_path / "one", tmp_path / "two")


def test_killed_and_begun_again_two_processes_train_as_one(mpl, vit_recipe, tmp_path) -> None:
    """kill -9 of one: the other stops, and the same command goes on from the last checkpoint, as one process would."""
    options = ["--set", "train_mpl.steps=10", "--set", "train_mpl.feedback=soft"]
    shared = [*options, "--set", "data.memory_gib=1.0e-6", "--set", "distributed.timeout_seconds=60"]
    arguments = ["train-mpl", "--recipe", vit_recipe, "--run"]
    pair = pair_by_hand([*arguments, tmp_path / "two", *shared])
    wait_for_step(tmp_path / "two/student", 5, pair[0])
    pair[1].kill()
    assert pair[0].wait() != 0
    pair = pair_by_hand([*arguments, tmp_path / "two", *shared])
    assert [process.wait() for process in pair] == [0, 0], pair[0].err + pair[1].err
    assert "goes on from step" in pair[0].err
    assert not (tmp_path / "two/decoded").exists()
    assert mpl(*arguments, tmp_path / "one", *options).status == 0
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.long  # torchrun itself: tests/distributed/test_checkpoints.py; going on: the test above
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(mpl, vit_recipe, tmp_path) -> None:
    """kill -9 of one process under torchrun's elastic launch, from the last checkpoint on.

    The two share a file of decoded images, and the one has them in memory.
    """
    longer = ["--set", "train_mpl.steps=16", "--set", "train_mpl.feedback=soft"]
    arguments = ["train-mpl", "--recipe", vit_recipe, *longer, "--run"]
    shared = ["--set", "data.memory_gib=1.0e-6"]
    with torchrun(2, *arguments, tmp_path / "killed", *shared, restarts=2) as process:
        wait_for_step(tmp_path / "killed/student", 5, process)
        children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        workers = [p for p in children if b"stages" in Path(f"/proc/{p}/cmdline").read_bytes()]
        os.kill(workers[-1], signal.SIGKILL)
        err = finish(process)
    assert "goes on from step" in err
    assert not (tmp_path / "killed/decoded").exists()
    assert mpl(*arguments, tmp_path / "alone").status == 0
    same(tmp_path / "alone", tmp_path / "killed")


def errors(err: str) -> list[str]:
    """What a person is told; torch's own log tells more."""
    return [line for line in err.splitlines() if line.startswith("Error")]


def pair_by_hand(arguments: list[object]) -> list[Command]:
    """The command in two processes, as torchrun would start them."""
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    everywhere["LOCAL_WORLD_SIZE"] = "2"
    return [start(*arguments, **everywhere, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def launch_by_hand(recipe: Path, run: Path, *changes: list[str], stage: str = "train-mpl") -> list[tuple[int, str]]:
    """One process for each of `changes`, as torchrun would start them; (status, standard error) of each."""
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(changes))}
    processes = []
    for rank, change in enumerate(changes):
        options = [part for text in change for part in ("--set", text)]
        variables = everywhere | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(changes))}
        processes.append(start(stage, "--recipe", recipe, "--run", run, *options, **variables))
    return [(process.wait(), process.err) for process in processes]


@pytest.mark.parametrize("change", ["steps", "checkpoint_every"])  # the other changes no result
def test_ranks_that_disagree_are_told_on_rank_0_alone(vit_recipe, tmp_path, change) -> None:
    changes = [f"train_mpl.{change}=12"], [f"train_mpl.{change}=13"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "run", *changes)
    assert (first[0], second[0]) == (2, 2)
    assert "the ranks disagree on the recipe: rank 1 (of 2)" in first[1]
    assert not errors(second[1])
    assert not (tmp_path / "run/train-mpl").exists()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(vit_recipe, tmp_path) -> None:
    changes = ["train_mpl.optimizer.lr=1.0e+30", "train_mpl.optimizer.clip_norm=null"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "run", changes, changes)
    assert (first[0], second[0]) == (1, 1)
    assert "training stopped before that update" in first[1]


def test_an_engine_that_cannot_is_refused_before_anything_is_loaded(vit_recipe, tmp_path) -> None:
    changes = ["distributed.layout=sharded"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "run", changes, changes)
    assert first[0] == second[0] != 0
    assert "test_vit lie in shards (FSDP2)" in first[1]
    assert "set the feedback engine to 'central'" in first[1]
    assert not errors(second[1])
    assert not (tmp_path / "run/train-mpl").exists()
    assert not (tmp_path / "run/student").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(vit_recipe, tmp_path) -> None:
    changes = ["train_mpl.labelled_batch=15"]
    first, second = launch_by_hand(vit_recipe, tmp_path / "run", changes, changes)
    assert (first[0], second[0]) == (2, 2)
    assert "train_mpl.labelled_batch (=15) must be a multiple of the number of processes (=2)" in first[1]
    assert not errors(second[1])
    assert not (tmp_path / "run/train-mpl").exists()


def test_other_stages_are_refused_under_torchrun(vit_recipe, run) -> None:
    first, _ = launch_by_hand(vit_recipe, run, [], [], stage="filter")
    assert first[0] == 2
    assert "filter runs in one process" in first[1]


def test_a_rank_that_does_not_come_is_named(vit_recipe, tmp_path) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = ["train-mpl", "--recipe", vit_recipe, "--run", tmp_path / "run", "--set"]
    process = start(*arguments, "distributed.timeout_seconds=3", **variables)
    assert process.wait() == 1
    assert "missing: 1" in process.err
    assert not (tmp_path / "run/train-mpl").exists()
