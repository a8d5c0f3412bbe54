"""Draws of the two moons."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.moons.settings import MoonsSettings
from pipeline.seeds import random_stream


@dataclass(frozen=True)
class Moons:
    """D draws, side by side.

    Attributes:
        draws: their numbers.
        points: (D, N, 2).
        clusters: true classes, (D, N), int64.
        labelled: rows that are labelled, (D, V), int64; the classes take turns.
    """

    draws: tuple[int, ...]
    points: Tensor
    clusters: Tensor
    labelled: Tensor

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """The labelled points, (D·V, 2), and their classes, (D·V,)."""
        return self.rows(self.labelled)

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Points (D·B, 2) and classes (D·B,) of rows (D, B)."""
        points = torch.gather(self.points, 1, chosen[..., None].expand(-1, -1, 2))
        return points.flatten(0, 1), torch.gather(self.clusters, 1, chosen).flatten()


def make_moons(draws: tuple[int, ...], settings: MoonsSettings, dtype: torch.dtype = torch.float32) -> Moons:
    """The data of these draws; each is a pure function of its number and of `settings`.

    The moons are half circles of radius 1, the lower one moved by (1, −1/2), as in scikit-learn's `make_moons`,
    with normal noise. Which points are labelled is drawn evenly within each cluster.
    """
    points, clusters, labelled = (
        np.stack(arrays) for arrays in zip(*(_draw(draw, settings) for draw in draws), strict=True)
    )
    return Moons(draws, torch.from_numpy(points).to(dtype), torch.from_numpy(clusters), torch.from_numpy(labelled))


def _draw(draw: int, settings: MoonsSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = random_stream(draw, "moons")
    half = settings.points // 2
    angle = np.linspace(0, np.pi, half)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    points = np.concatenate([upper, lower]) + random.normal(scale=settings.noise, size=(2 * half, 2))  # (N, 2)
    clusters = np.repeat(np.arange(2), half)
    labelled = np.stack(
        [c * half + random.permutation(half)[: settings.labelled] for c in range(2)], axis=1
    )  # (V/2, 2)
    return points, clusters, labelled.reshape(-1)
