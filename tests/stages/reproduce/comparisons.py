"""Chains in this process: the same steps in the same order, without a process for each."""

from pathlib import Path
from typing import Any

from stages.options import Context
from stages.reproduce.chains import Chain, _portable, run_step

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


def run_here(context: Context, chains: dict[int, Chain], jobs: int | None) -> dict[int, list[dict[str, Any]]]:
    """In the place of `stages.reproduce.chains.run_chains`."""
    return {
        seed: [run_step(_portable(context, seed, step), step, 1) for step in chain] for seed, chain in chains.items()
    }


def tiny(folder: Path) -> Path:
    """The recipe's file."""
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return path
