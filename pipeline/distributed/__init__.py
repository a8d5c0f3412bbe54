"""Training with several processes: who takes part, how networks lie on them, checkpoints that can be resharded."""

from pipeline.distributed.ranks import ALONE, Ranks

__all__ = ["ALONE", "Ranks"]
