"""A tiny recipe, the command line in this process, and a finished run to start from."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stages import commands

RECIPE = """
name: tiny
data: {manifest: digits, image_size: 8}
pretrain:
  model: {name: wrn_10_1, dropout: 0.1}
  steps: 24
  batch: 16
  ema_decay: 0.9
  checkpoint_every: 5
  log_every: 4
  optimizer: {rule: nesterov, lr: 0.05}
filter: {k: 30}
train_reduced:
  model: {name: wrn_10_1, dropout: 0.1}
  steps: 24
  batch: 16
  ema_decay: 0.9
  checkpoint_every: 5
  log_every: 4
  optimizer: {rule: rmsprop_tf, lr: 0.01, clip_norm: 5}
  augment: {rotate: 10, randaugment_layers: 1}
finetune: {steps: 5, batch: 16, optimizer: {rule: sgd, lr: 0.001}}
reproduce: {seeds: 2}
"""


@dataclass
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _server_of_commands() -> Iterator[None]:
    yield
    commands.Server.stop()


@pytest.fixture(autouse=True)
def _commands_end_with_their_test() -> Iterator[None]:
    yield
    commands.end_all()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def mpl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`mpl(*arguments)` in this process."""
    from stages.cli import main

    monkeypatch.delenv("MPL_DATA", raising=False)
    monkeypatch.delenv("MPL_RUN", raising=False)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mpl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        text = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), text.out, text.err)

    return call


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages done; copy it before changing it."""
    from stages import evaluate, filter, precompute, pretrain, train_reduced
    from stages.console import Console
    from stages.execution import execute
    from stages.options import Options, make_context

    run = tmp_path_factory.mktemp("finished") / "run"
    context = make_context(Options(run, str(recipe)), console=Console(quiet=True))
    for stage in (pretrain, filter, precompute, train_reduced, evaluate):
        execute(context, stage.plan)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
