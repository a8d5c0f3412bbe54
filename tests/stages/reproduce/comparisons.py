"""A tiny recipe, and chains that run in this process: the same steps, without a process for each."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.storage.runs import differences
from stages.console import Console
from stages.options import Context, Options, make_context
from stages.reproduce import chains

TINY = """
name: tiny
data: {manifest: digits, image_size: 8}
pretrain: {model: {name: wrn_10_1}, steps: 3, batch: 8, optimizer: {rule: sgd, lr: 0.05}}
filter: {k: 10}
train_reduced: {model: {name: wrn_10_1}, steps: 8, batch: 8, checkpoint_every: 3, optimizer: {rule: sgd, lr: 0.05}}
train_mpl:
  model: {name: wrn_10_1, dropout: 0.1}
  method: {name: uda, threshold: 0.3}
  steps: 4
  batch: 8
  labelled_batch: 8
  label_smoothing: 0.1
  optimizer: {rule: nesterov, lr: 0.02}
  feedback_options: {batch: 8}
finetune: {steps: 2, batch: 8, optimizer: {rule: sgd, lr: 0.01}}
reproduce: {seeds: 2, methods: [{name: fixmatch, threshold: 0.5}]}
"""


class InThisProcess(Executor):
    """In the place of the pool of processes: one step after another, on one thread of torch."""

    turn = Lock()

    def __init__(self, *args: Any, **settings: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], values: dict, step: chains.Step, threads: int) -> Future:  # type: ignore[override]
        future: Future = Future()
        try:
            with self.turn:
                future.set_result(function(values, step, 1))
        except BaseException as error:
            future.set_exception(error)
        return future


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chains run in this process."""
    monkeypatch.setattr(chains, "ProcessPoolExecutor", InThisProcess)


def tiny(folder: Path) -> Path:
    """The recipe's file."""
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return path


def tiny_context(folder: Path) -> Context:
    """Of the tiny recipe."""
    return make_context(Options(folder / "run", str(tiny(folder))), console=Console(quiet=True))


def different_keys(a: Recipe, b: Recipe) -> set[str]:
    """Settings in which two recipes differ."""
    return {line.split(":")[0] for line in differences(a.model_dump(mode="json"), b.model_dump(mode="json"))}
