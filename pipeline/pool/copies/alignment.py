"""Laying one picture over another, and how alike they then are.

An affine map from the evaluation image to the pool image is found by Gauss–Newton on the difference of the pictures
(inverse compositional image alignment, Baker and Matthews 2004), first at 16 pixels, then at 32, starting from the
windows in which the thumbnails agreed. The similarity is the correlation of their *detail*: what is left of the
luminance when a blurred version is taken away, with strong values held down, so that one dark spot on a plain ground
does not decide alone.

Nothing here depends on how pairs are grouped: sums run within a pair, and there are no matrix products.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
MARGIN = 4  # pixels at each edge that are not compared: shifts, frames and wrapped edges live there
STEPS = (3, 2)  # at 16 and at 32 pixels
HELPFUL = 0.5  # correlation at 16 pixels below which a map is given up
LIMITS = (0.4, 2.4, 0.35, 9.0)  # of a map: least and greatest change of area, greatest turn or shear, shift in pixels
STRETCH, SKEW = 0.25, 0.5
"""What a map costs in similarity, per share by which it stretches one way more than the other, and per sine of skew:
copies are trimmed and turned, but look-alikes fit best when bent (median stretch 0.17 and skew 0.1 against 0.01)."""
BLOCKS, SPOILT, DOUBT = 4, 6, 0.13
"""Of 4 × 4 blocks, the 6 that agree least may be left out, as if covered by a caption, at a cost of 0.13."""
COVERED = 0.25  # of the pixels, at least, must be in both pictures
DAMPING = (0.06, 0.06, 0.001) * 2  # per pixel compared; turns and zooms cost more than shifts


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures to be laid over one another.

    Attributes:
        evaluation: luminance, (n, 32, 32), float32 in [0, 255].
        query: the same of the pool's images, turned and mirrored as the candidate wants.
        start: (n, 2, 3): from coordinates (x, y, 1) in the evaluation image, pixels from its centre, to the query's.
    """

    evaluation: Tensor
    query: Tensor
    start: Tensor


def similarity_of(pairs: Pairs) -> Tensor:
    """Correlation of the detail at the best alignment found, less what the bending costs, (n,), in [−1, 1]; 0 where
    there is nothing to compare."""
    result = torch.zeros(len(pairs.start))
    coarse, before, after = _align(pairs, SIDE // 2, STEPS[0])
    at = (torch.maximum(before, after) >= HELPFUL).nonzero()[:, 0]
    if len(at):
        left = Pairs(pairs.evaluation[at], pairs.query[at], coarse[at])
        fine, _, _ = _align(left, SIDE, STEPS[1])
        seen = detail(left.evaluation)
        result[at] = _agreement(seen, left.query, fine) - _bending(fine)
        # a frame or a caption can draw the map away from where it began
        also = (before[at] >= HELPFUL).nonzero()[:, 0]
        began = _agreement(seen[also], left.query[also], pairs.start[at[also]])
        result[at[also]] = torch.maximum(result[at[also]], began)
    return result.clamp(-1, 1)


def detail(grey: Tensor) -> Tensor:
    """(n, s, s) less its 5×5 blur, lightly smoothed against coding noise, strong values held down."""
    return _held_down(_smooth(grey) - _blur(grey, 2), 0.5)


def _align(pairs: Pairs, side: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (n, 2, 3) after so many Gauss–Newton steps at `side` pixels, and the correlation, (n,), before and after."""
    if side < SIDE:
        # smooth enough that a shift by half a pixel of 16 changes little
        grey, query = (F.avg_pool2d(_smooth(_smooth(x)), 2) for x in (pairs.evaluation, pairs.query))
        grey, query = (_held_down(x - _blur(x, 1), 1.0) for x in (grey, query))
    else:
        grey, query = (_held_down(_smooth(x) - _blur(x, 3), 1.0) for x in (pairs.evaluation, pairs.query))
    points, edge = _points(side)
    inner = slice(edge, side - edge)
    across, down = torch.zeros_like(grey), torch.zeros_like(grey)
    across[:, :, 1:-1] = (grey[:, :, 2:] - grey[:, :, :-2]) * (side / SIDE / 2)
    down[:, 1:-1] = (grey[:, 2:] - grey[:, :-2]) * (side / SIDE / 2)
    everywhere = torch.ones(len(grey), points.shape[1])
    target, scale = _standardised(grey[:, inner, inner].flatten(1), everywhere)  # (n, p)
    across, down = across[:, inner, inner].flatten(1) / scale, down[:, inner, inner].flatten(1) / scale
    slopes = (across * points[0], across * points[1], across, down * points[0], down * points[1], down)
    inverse = _inverse_normal_matrix(slopes)
    maps, before = pairs.start, torch.zeros(0)
    for step in range(steps + 1):
        seen, inside = _seen(query, maps, points)
        values, _ = _standardised(seen, inside)
        if step == 0:
            before = _correlation(values * inside, target * inside, inside)
        if step == steps:
            break
        residual = ((values - target) * inside).clamp(-2, 2)
        gradient = torch.stack([(slope * residual).sum(1) for slope in slopes], 1)  # (n, 6)
        maps = _less(maps, (inverse * gradient[:, None]).sum(2))
    return _tame(maps, pairs.start), before, _correlation(values * inside, target * inside, inside)


def _inverse_normal_matrix(slopes: tuple[Tensor, ...]) -> Tensor:
    """(n, 6, 6) of the slopes, each (n, p), damped."""
    n, p = slopes[0].shape
    normal = torch.empty(n, 6, 6)
    for i in range(6):
        for j in range(i + 1):
            normal[:, i, j] = normal[:, j, i] = (slopes[i] * slopes[j]).sum(1)
        normal[:, i, i] += DAMPING[i] * p
    return torch.linalg.inv(normal)


def _less(maps: Tensor, change: Tensor) -> Tensor:
    """maps ∘ (identity + change)⁻¹, written out; change is (n, 6)."""
    a, b, x, c, d, y = change.unbind(1)
    a, d = a + 1, d + 1
    area = a * d - b * c
    area = torch.where(area.abs() < 0.1, 0.1, area)
    back = torch.stack([d, -b, b * y - d * x, -c, a, c * x - a * y], 1).view(-1, 2, 3) / area[:, None, None]
    turned = maps[:, :, :1] * back[:, :1] + maps[:, :, 1:2] * back[:, 1:]
    turned[:, :, 2] += maps[:, :, 2]
    return turned


def _tame(maps: Tensor, otherwise: Tensor) -> Tensor:
    """Maps within the limits; the others as they were."""
    least, most, turn, shift = LIMITS
    area = maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]
    fine = (area > least) & (area < most) & (maps[:, 0, 1].abs() < turn) & (maps[:, 1, 0].abs() < turn)
    fine &= (maps[:, :, 2].abs() < shift).all(1)
    return torch.where(fine[:, None, None], maps, otherwise)


def _bending(maps: Tensor) -> Tensor:
    """What maps (n, 2, 3) cost, (n,)."""
    columns = maps[:, :, :2]
    across, down = (columns * columns).sum(1).sqrt().unbind(1)
    skew = (columns[:, :, 0] * columns[:, :, 1]).sum(1).abs() / (across * down)
    return STRETCH * (1 - torch.minimum(across, down) / torch.maximum(across, down)) + SKEW * skew


def _agreement(seen: Tensor, query: Tensor, maps: Tensor) -> Tensor:
    """Correlation, (n,), of the evaluation image's detail with that of the query laid over it."""
    everywhere, _ = _points(SIDE, 0)
    over, inside = (x.view(-1, SIDE, SIDE) for x in _seen(query, maps, everywhere))
    inner = slice(MARGIN, SIDE - MARGIN)
    both = (_blur(inside, 2) > 0.99).float()[:, inner, inner].flatten(1)  # where no blur reached outside
    left, _ = _standardised(seen[:, inner, inner].flatten(1), both)
    right, _ = _standardised(detail(over)[:, inner, inner].flatten(1), both)
    return torch.where(both.sum(1) >= COVERED * SIDE * SIDE, _correlation(left * both, right * both, both), 0.0)


def _correlation(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Of standardised pictures (n, p), (n,): over all pixels, or over the blocks that agree best, at a cost."""
    whole = (left * right).sum(1) / weight.sum(1).clamp_min(1)
    ours, theirs, shared = (_block_sums(x) for x in (left * left, right * right, left * right))  # (n, blocks)
    worst = (ours + theirs - 2 * shared).topk(SPOILT, dim=1).indices
    ours, theirs, shared = (x.scatter(1, worst, 0.0).sum(1) for x in (ours, theirs, shared))
    return torch.maximum(whole, shared / (ours * theirs).sqrt().clamp_min(0.05 * left.shape[1]) - DOUBT)


def _block_sums(values: Tensor) -> Tensor:
    """(n, p) → (n, 16)."""
    side = round(values.shape[1] ** 0.5) // BLOCKS
    return values.view(-1, BLOCKS, side, BLOCKS, side).sum((2, 4)).flatten(1)


def _seen(query: Tensor, maps: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """What a query (n, s, s) shows at points (2, p) of the evaluation image, (n, p), and whether they are inside."""
    at = maps[:, :, :1] * points[0] + maps[:, :, 1:2] * points[1] + maps[:, :, 2:]  # (n, 2, p)
    grid = (at * (2 / SIDE)).transpose(1, 2)[:, None]
    values = F.grid_sample(query[:, None], grid, padding_mode="border", align_corners=False)[:, 0, 0]
    return values, (at.abs() <= SIDE / 2 - 0.25).all(1).float()


def _points(side: int, margin: int = MARGIN) -> tuple[Tensor, int]:
    """Centres (2, p) of a grid's pixels less the margin, in 32nds of the picture from its centre; the margin in
    pixels of the grid."""
    edge = margin * side // SIDE
    line = ((torch.arange(side) + 0.5) * (SIDE / side) - SIDE / 2)[edge : side - edge]
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()]), edge


def _standardised(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, p) of weighted mean 0 and deviation 1, and the deviation (n, 1); flat rows become near 0."""
    total = weight.sum(1, keepdim=True).clamp_min(1)
    values = values - (values * weight).sum(1, keepdim=True) / total
    deviation = ((values * values * weight).sum(1, keepdim=True) / total).sqrt().clamp_min(0.02)
    return values / deviation, deviation


def _held_down(values: Tensor, share: float) -> Tensor:
    """(n, s, s) → (−1, 1): linear below `share` of the inner deviation (and one grey level), flat beyond."""
    edge = MARGIN * values.shape[1] // SIDE
    inner = values[:, edge:-edge, edge:-edge]  # frames are not to hold down the rest
    bend = (inner * inner).mean((1, 2), keepdim=True).sqrt() * share + 1
    return values / (values * values + bend * bend).sqrt()


def _blur(grey: Tensor, reach: int) -> Tensor:
    """Mean over (2·reach + 1)² pixels; edges repeat."""
    wide, side = 2 * reach + 1, grey.shape[1]
    padded = F.pad(grey[:, None], (reach,) * 4, mode="replicate")[:, 0]
    rows = padded[:, :side].clone()
    for at in range(1, wide):
        rows += padded[:, at : at + side]
    result = rows[:, :, :side].clone()
    for at in range(1, wide):
        result += rows[:, :, at : at + side]
    return result / (wide * wide)


def _smooth(grey: Tensor) -> Tensor:
    """Weighted 1 2 1 both ways; edges repeat."""
    padded = F.pad(grey[:, None], (1,) * 4, mode="replicate")[:, 0]
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16
