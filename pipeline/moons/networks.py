"""Small perceptrons of many draws as one module."""

import itertools

import torch
from torch import Tensor, nn

from pipeline.moons.settings import MoonsSettings
from pipeline.seeds import derive_seed


class Perceptrons(nn.Module):
    """D independent perceptrons, 2 → hidden → hidden → 2 with sigmoids between; no weight is shared.

    Rows of draw d are d·B … (d+1)·B − 1. A loss that is the mean over all D·B rows has 1/D of each draw's own
    gradient, so plain SGD at D times the learning rate takes, in each draw, the step that it would take alone:
    one `Student` trains D students, and `target_gradient` times D is each draw's own dR/dq.

    Args:
        draws: their numbers; a draw's initial weights do not depend on the others.
        settings: sizes and range of the initial weights.
        role: of the network ("student", "teacher"): other roles start elsewhere.
    """

    def __init__(
        self, draws: tuple[int, ...], settings: MoonsSettings, role: str, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        sizes = (2, settings.hidden, settings.hidden, 2)
        self.draws = len(draws)
        generators = [torch.Generator().manual_seed(derive_seed(draw, "weights", role)) for draw in draws]

        def uniform(*shape: int) -> nn.Parameter:
            drawn = [torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1 for g in generators]
            return nn.Parameter((settings.init * torch.stack(drawn)).to(dtype))  # (D, *shape)

        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            self.weights.append(uniform(before, after))
            self.biases.append(uniform(1, after))

    def forward(self, points: Tensor) -> Tensor:
        """Logits, (D·B, 2), of points (D·B, 2)."""
        x = points.view(self.draws, -1, points.shape[-1])  # (D, B, 2)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = x.sigmoid()
        return x.flatten(0, 1)

    def optimizer(self, lr: float) -> torch.optim.SGD:
        """Plain SGD with learning rate `lr` in each draw, for losses that are means over all rows."""
        return torch.optim.SGD(self.parameters(), lr=lr * self.draws)
