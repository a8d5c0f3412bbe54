"""The same work in this process, in worker processes and on Ray: same results, and what happens when things break."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import DataError, UsageError
from pipeline.storage import workers
from pipeline.storage.workers import RETRIES, EngineSettings, WorkFailed, run_all
from tests.processes import ended, wait_until

pytestmark = pytest.mark.xdist_group("ray")
PATIENCE = {  # seconds, milliseconds and attempts that Ray's processes give each other to start
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_raylet_client_num_connect_attempts": "300",
    "RAY_agent_register_timeout_ms": "300000",
}
ENGINES = {
    "here": EngineSettings(),
    "2 processes": EngineSettings(workers=2),
    "4 processes": EngineSettings(workers=4),
    "ray": EngineSettings(kind="ray", workers=0, cpus=0.5),
}


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """Ray is started by the first test that needs it, with patience, and stopped after the last."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        yield
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def start_ray() -> None:
    """Ray gives its node half a minute, which is not enough on a very busy machine; then try again."""
    for left in (2, 1, 0):
        try:
            workers._ray(None)
            return
        except UsageError:
            if not left:
                raise


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineSettings:
    return ENGINES[request.param]


@dataclass(frozen=True)
class Square:
    """Writes n² to a file for n; `trouble` says what goes wrong with which item."""

    folder: Path
    trouble: str = ""
    at: int = -1

    def __call__(self, number: int, progress: Callable[[int], None]) -> int:
        with (self.folder / f"tries-{number}").open("a") as file:
            file.write("x")
        if number == self.at:
            self.break_down()
        progress(1)
        (self.folder / str(number)).write_text(str(number**2))
        return number**2

    def break_down(self) -> None:
        if self.trouble == "user":
            raise DataError(f"shard {self.at} is cut short")
        if self.trouble == "defect":
            raise ZeroDivisionError("ours")
        if self.trouble == "dies" or not (self.folder / "died").exists():
            (self.folder / "died").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)


def run(engine: EngineSettings, work: Square, items: int = 7, **more: Callable[[], bool]) -> dict[int, int]:
    """Results by item."""
    if engine == ENGINES["ray"]:
        start_ray()
    found: dict[int, int] = {}
    run_all(
        engine, work, list(range(items)), name=lambda item: f"item {item}", progress=lambda count: None,
        done=lambda item, result: found.update({item: result}), **more,
    )  # fmt: skip
    return found


def tries(folder: Path) -> dict[int, int]:
    return {int(path.name[6:]): len(path.read_text()) for path in folder.glob("tries-*")}


def test_every_engine_does_every_item_once(engine, tmp_path) -> None:
    assert run(engine, Square(tmp_path)) == {n: n**2 for n in range(7)}
    assert tries(tmp_path) == dict.fromkeys(range(7), 1)
    assert run(engine, Square(tmp_path), items=0) == {}


def test_one_bad_shard_does_not_stop_the_others(engine, tmp_path) -> None:
    with pytest.raises(
        WorkFailed, match=r"1 of 7 could not be done; the others are(.|\n)*item 3: shard 3 is cut short"
    ):
        run(engine, Square(tmp_path, "user", 3))
    assert {int(path.name) for path in tmp_path.glob("[0-9]")} == {0, 1, 2, 4, 5, 6}


def test_a_defect_of_ours_is_not_hidden(engine, tmp_path) -> None:
    with pytest.raises(Exception, match="ours"):
        run(engine, Square(tmp_path, "defect", 3))


@pytest.mark.parametrize("kind", ["2 processes", "ray"])
@pytest.mark.parametrize("trouble", ["dies once", "dies"])
def test_a_worker_that_dies(kind, trouble, tmp_path) -> None:
    """Once: its item is tried again. Always: it is named, and the others are done."""
    if trouble == "dies once":
        assert run(ENGINES[kind], Square(tmp_path, trouble, 3)) == {n: n**2 for n in range(7)}
        assert tries(tmp_path)[3] == 2
    else:
        with pytest.raises(WorkFailed, match=rf"item 3: its (Ray )?worker died {RETRIES + 1} times"):
            run(ENGINES[kind], Square(tmp_path, trouble, 3))
        assert {int(path.name) for path in tmp_path.glob("[0-9]")} == {0, 1, 2, 4, 5, 6}
        assert tries(tmp_path)[3] == RETRIES + 1


def test_stopped_early(tmp_path) -> None:
    for name in ("here", "2 processes"):
        count = 0

        def stop() -> bool:
            nonlocal count
            count += 1
            return count == 2

        with pytest.raises(KeyboardInterrupt, match="what is done stays"):
            run(ENGINES[name], Square(tmp_path), items=50, stop=stop)
        assert len(list(tmp_path.glob("tries-*"))) < 50


def test_workers_die_with_their_parent(tmp_path) -> None:
    """kill -9 of the command alone: no worker is left that would write into the run."""
    code = f"""
import time
from pathlib import Path
from pipeline.storage.workers import EngineSettings, run_all
from tests.storage.test_workers import Sleep
run_all(EngineSettings(workers=2), Sleep(Path({str(tmp_path)!r})), [0, 1], name=str, progress=print, done=print)
"""
    with ended(subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])) as parent:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2 or parent.poll() is not None, "two workers that work")
        numbers = [int(path.name) for path in tmp_path.iterdir()]
        assert len(numbers) == 2
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in numbers), "the workers' end")


@dataclass(frozen=True)
class Sleep:
    """Tells its process id and sleeps."""

    folder: Path

    def __call__(self, number: int, progress: Callable[[int], None]) -> int:
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)
        return number


def test_wrong_settings(tmp_path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        EngineSettings(workers=0)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(UsageError, match=f"no cluster at {address}.*ray start --head"):
            run(EngineSettings(kind="ray", address=address), Square(tmp_path))
