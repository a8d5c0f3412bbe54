"""Two torchrun agents, as on two machines: one loses its worker, and both go on and finish."""

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import launch
from tests.distributed.worlds import free_port
from tests.processes import LIMIT, ended

pytestmark = pytest.mark.xdist_group("torchrun")

ROOT = Path(__file__).parents[2]


@pytest.mark.long  # one machine: tests/stages/test_torchrun.py
def test_a_worker_that_is_killed_on_one_of_two_machines(tmp_path: Path) -> None:
    """The agent of the other sees healthy workers and new nodes: it does not count this as a restart of its own."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
        "--monitor-interval=0.2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-conf=keep_alive_max_attempt=100,read_timeout=900", "--local-addr=127.0.0.1",
        "-m", "tests.distributed.training", str(tmp_path), "6", "5",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with ExitStack() as ends:
        agents = [
            ends.enter_context(
                ended(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                    )
                )
            )
            for _ in range(2)
        ]
        said = [agent.communicate(timeout=LIMIT)[0][-3000:] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert (tmp_path / "died").exists()
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert found["started_at"] == 4
    assert found["launch"] == (tmp_path / "launch").read_text()  # of the attempt that was cut short


def test_what_an_attempt_before_left_in_the_store_is_not_answered() -> None:
    """Two ranks meet, though the store still has a greeting, and a rank that was there."""
    store = dist.HashStore()
    for key in ("hello/0", "hello/1", "here/0", "here/1", "welcome/old/0"):
        store.set(key, "old")
    met: dict[int, str] = {}

    def come(rank: int) -> None:
        keys, missing = launch._meet_all(store, 2, LIMIT) if rank == 0 else launch._meet(store, 1, 2, LIMIT)
        assert not missing
        keys.set(f"seen/{rank}", "1")
        keys.wait([f"seen/{1 - rank}"])
        met[rank] = "yes"

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert met == {0: "yes", 1: "yes"}
    assert launch._meet_all(store, 2, 0.1)[1] == [1]  # the next attempt is another one
