"""Where and how a training runs: device, precision, processes."""

from dataclasses import dataclass

import torch

from pipeline.distributed.layouts import Layout
from pipeline.distributed.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Placement:
    """Changes no result but by rounding, and by batch statistics, which are each micro-batch's own.

    Attributes:
        device: of networks and batches.
        autocast: dtype of mixed precision (torch.bfloat16), or None.
        ranks: the processes that train together; each has its part of every batch.
        layout: how a network lies on them.
        micro_batches: parts in which a process takes its part of a batch, for memory.
    """

    device: torch.device = torch.device("cpu")
    autocast: torch.dtype | None = None
    ranks: Ranks = ALONE
    layout: Layout = Layout()
    micro_batches: int = 1
