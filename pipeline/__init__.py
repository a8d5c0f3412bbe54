"""Reduced Meta Pseudo Labels (arXiv:2003.10580): the library. No command line, no printing.

The doors below are opened when they are asked for: importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.batches import Batch as Batch
    from pipeline.batches import Labelled as Labelled
    from pipeline.batches import TargetBatch as TargetBatch
    from pipeline.config import load_recipe as load_recipe
    from pipeline.data.images import load_data_set as load_data_set
    from pipeline.networks.loading import load_network as load_network
    from pipeline.pool.select import select_top_k as select_top_k
    from pipeline.student import Student as Student
    from pipeline.targets import TargetsStore as TargetsStore
    from pipeline.teacher_network import TeacherNetwork as TeacherNetwork
    from pipeline.teachers import Calibrator as Calibrator
    from pipeline.teachers import FixedTargets as FixedTargets
    from pipeline.teachers import Proposal as Proposal
    from pipeline.training import Journal as Journal
    from pipeline.training import Training as Training

__version__ = "0.1.0"

DOORS = {  # name: module
    "Batch": "pipeline.batches",
    "Calibrator": "pipeline.teachers",
    "FixedTargets": "pipeline.teachers",
    "Journal": "pipeline.training",
    "Labelled": "pipeline.batches",
    "Proposal": "pipeline.teachers",
    "Student": "pipeline.student",
    "TargetBatch": "pipeline.batches",
    "TargetsStore": "pipeline.targets",
    "TeacherNetwork": "pipeline.teacher_network",
    "Training": "pipeline.training",
    "load_data_set": "pipeline.data.images",
    "load_network": "pipeline.networks.loading",
    "load_recipe": "pipeline.config",
    "select_top_k": "pipeline.pool.select",
}

__all__ = ["DOORS", "__version__", *DOORS]


def __getattr__(name: str) -> Any:
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(DOORS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
