"""`mpl` in processes of their own, which can be killed: forks of one that has imported torch, so a start is quick."""

import atexit
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.processes import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
PRELOADED = ("stages.pretrain", "stages.filter", "stages.precompute", "stages.train_reduced", "stages.train_mpl",
             "stages.evaluate", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard",
             "torch._decomp.decompositions_for_jvp", "sklearn.datasets", "faiss")  # fmt: skip


class Command:
    """An `mpl`, the first of a process group of its own."""

    def __init__(self, arguments: list[str], variables: Mapping[str, str], file_bytes: int | None) -> None:
        self.name, self.returncode = f"mpl {' '.join(arguments)}", None
        self._files = ExitStack()
        self._out, self._err = (self._files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))  # noqa: SIM115
        self._connection = self._files.enter_context(Server.connect())
        request = {"arguments": arguments, "variables": dict(variables), "file_bytes": file_bytes}
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"],
                        [self._out.fileno(), self._err.fileno()])  # fmt: skip
        self.pid = self._number(LIMIT)

    def _number(self, limit: float) -> int:
        self._connection.settimeout(limit)
        data = self._connection.recv(4)
        assert len(data) == 4, f"the process that {self.name} is forked from has died"
        return int.from_bytes(data, "big", signed=True)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = self._number(LIMIT)
        return self.returncode

    def wait(self, limit: float = LIMIT) -> int:
        """The exit status, once it has ended."""
        if self.returncode is None:
            try:
                self.returncode = self._number(limit)
            except TimeoutError:
                self.kill()
                raise AssertionError(f"{self.name} has not ended in {limit:g} s: {self.err}") from None
        return self.returncode

    @property
    def err(self) -> str:
        """What it has written to standard error."""
        self._err.seek(0)
        return self._err.read()

    def signal(self, number: int) -> None:
        """To all of its group."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """kill -9 of the group, and wait for it."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End whatever is left of its group."""
        self.kill()
        self._files.close()


RUNNING: list[Command] = []  # of the test that is under way


def start(*arguments: object, file_bytes: int | None = None, **variables: str) -> Command:
    """`mpl ARGUMENTS` with more environment variables; no file of it can grow beyond `file_bytes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MPL_")}
    RUNNING.append(Command([str(a) for a in arguments], kept | variables, file_bytes))
    return RUNNING[-1]


def end_all() -> None:
    """End what a test has started and not ended itself."""
    while RUNNING:
        RUNNING.pop().close()


def wait_for_step(folder: Path, step: int, process: "Command | subprocess.Popen[str]") -> None:
    """Until a checkpoint of at least `step` is whole."""
    index = folder / "checkpoints" / "index.json"

    def reached() -> bool:
        assert process.poll() is None, f"it ended before step {step}: {getattr(process, 'err', '')}"
        return index.exists() and json.loads(index.read_text())["checkpoints"][-1]["step"] >= step

    wait_until(reached, f"a checkpoint of step {step} in {folder}")


class Server:
    """The process that commands are forked from; begun by the first command."""

    process: subprocess.Popen[bytes] | None = None
    listener: socket.socket

    @classmethod
    def connect(cls) -> socket.socket:
        if cls.process is None:
            cls.listener = socket.socket(socket.AF_UNIX)
            cls.listener.bind(f"{tempfile.mkdtemp()}/commands")
            cls.listener.listen(64)
            number = cls.listener.fileno()
            cls.process = subprocess.Popen(
                [sys.executable, "-m", "tests.stages.commands", str(number)], cwd=ROOT, stdin=subprocess.PIPE,
                pass_fds=[number], start_new_session=True,
            )  # fmt: skip
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(cls.listener.getsockname())
        return connection

    @classmethod
    def stop(cls) -> None:
        """After the last command."""
        if cls.process is not None:
            cls.process.communicate(timeout=LIMIT)
            path = Path(cls.listener.getsockname())
            cls.listener.close()
            path.unlink()
            path.parent.rmdir()
            cls.process = None


def _serve(listener: socket.socket) -> None:
    """Fork, for each connection, a process that starts the command and tells of its end; until standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection)
            return
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Start the command that is asked for; in the command itself, be it."""
    data, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.setsid()
        connection.sendall(os.getpid().to_bytes(4, "big", signed=True))
        connection.close()
        _be(json.loads(data), *files)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(4, "big", signed=True))
    os._exit(0)


def _be(request: dict, out: int, err: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell
    os.environ.clear()
    os.environ.update(request["variables"])
    if (size := request["file_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.argv = ["mpl", *request["arguments"]]
    from stages.cli import main

    try:
        main()
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking three thousand modules apart would take two seconds


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
