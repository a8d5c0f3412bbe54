"""Small line charts as coordinates; the page draws them as SVG. And numbers as a person reads them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = (0.5, 0.9, 0.99, 1 - 1e-4, 1 - 1e-6, 1 - 1e-8, 0.7, 0.999, 1 - 1e-5, 1 - 1e-7, 0.6, 0.8)  # most wanted first
APART = 17  # pixels between two of them, at least


@dataclass(frozen=True)
class Tick:
    """A position on an axis, in pixels, and its text."""

    position: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line in a chart: `x,y` pairs in pixels, and a name for its style."""

    name: str
    points: str
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart in pixels: the plot lies right of `left` and above `bottom`.

    Attributes:
        title: for people, and for those who do not see it.
        width, height: of the whole.
        left, bottom: edges of the plot.
        lines: to draw.
        x, y: ticks.
        empty: where the plot is without data at its right end, from this x on; None: nowhere.
        level: a horizontal line, in pixels, or None.
    """

    title: str
    width: int
    height: int
    left: float
    bottom: float
    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    empty: float | None = None
    level: float | None = None


def percent(log_odds: float) -> str:
    """A probability as a percentage, with as many decimals as separate it from 0 and 100 %."""
    rest = 100 / (1 + math.exp(min(700.0, abs(log_odds))))  # of the less probable side
    if rest < 0.00005:
        return "> 99.9999%" if log_odds > 0 else "< 0.0001%"
    decimals = min(4, max(1, math.ceil(-math.log10(rest) - 1e-6) + (log_odds < 0)))
    return f"{100 - rest if log_odds >= 0 else rest:.{decimals}f}%"


def rank_chart(
    title: str,
    ranks: NDArray[np.int64],
    log_odds: NDArray[np.float32],
    *,
    end: int,
    span: tuple[float, float],
) -> Chart:
    """Probability by rank, on a scale of log-odds.

    Args:
        title: of the chart.
        ranks, log_odds: points of the curve, (n,).
        end: the scale's right end, a rank counted from 1.
        span: lowest and highest log-odds of the scale, the same for all classes of a run.
    """
    width, height = 300, 150
    left, right, top, bottom = 58.0, width - 6.0, 8.0, height - 20.0
    low, high = span
    xs = left + (right - left) * ranks / max(1, end - 1)
    ys = bottom - (bottom - top) * (log_odds - low) / (high - low)
    ticks: list[Tick] = []
    for z in (sign * math.log(p / (1 - p)) for p in LEVELS for sign in (1, -1)):
        y = bottom - (bottom - top) * (z - low) / (high - low)
        if low <= z <= high and all(abs(y - tick.position) >= APART for tick in ticks):
            ticks.append(Tick(y, _level(z)))
    return Chart(
        title=title,
        width=width,
        height=height,
        left=left,
        bottom=bottom,
        lines=(Line("probability", _points(xs, ys)),) if len(ranks) else (),
        x=(Tick(left, "1"), Tick(right, f"{end:,}")),
        y=tuple(ticks),
        empty=float(xs[-1]) if len(ranks) and ranks[-1] < end - 1 else left if not len(ranks) else None,
        level=float(ys[-1]) if len(ranks) else None,
    )


def step_chart(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Chart:
    """Lines over training steps, by name: steps (n,) and values (n,). Values that are not finite are passed over."""
    width, height = 360, 180
    left, right, top, bottom = 46.0, width - 10.0, 10.0, height - 22.0
    clean = {}
    for name, (steps, values) in series.items():
        pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        if pairs:
            clean[name] = np.array(pairs)  # (n, 2)
    all_points = np.concatenate(list(clean.values())) if clean else np.array([[0.0, 0.0]])
    last = max(1.0, float(all_points[:, 0].max()))
    ticks = nice_ticks(float(all_points[:, 1].min()), float(all_points[:, 1].max()))
    low, high = min(ticks[0], float(all_points[:, 1].min())), max(ticks[-1], float(all_points[:, 1].max()))

    def placed(pairs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return (
            left + (right - left) * pairs[:, 0] / last,
            bottom - (bottom - top) * (pairs[:, 1] - low) / (high - low),
        )

    lines = []
    for name, points in clean.items():
        xs, ys = placed(points)
        dots = tuple((round(float(x), 1), round(float(y), 1)) for x, y in zip(xs, ys, strict=True))
        lines.append(Line(name, _points(xs, ys), dots if len(points) <= 8 else ()))
    return Chart(
        title=title,
        width=width,
        height=height,
        left=left,
        bottom=bottom,
        lines=tuple(lines),
        x=(Tick(left, "0"), Tick(right, f"{last:,.0f}")),
        y=tuple(Tick(bottom - (bottom - top) * (value - low) / (high - low), f"{value:.4g}") for value in ticks),
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low … high, at least two and at most `most` + 1 of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(step * i, 12) for i in range(first, last + 1)]
    return ticks[: most + 2]


def _level(log_odds: float) -> str:
    p = 1 / (1 + math.exp(-log_odds))
    return f"1 − 10⁻{_raised(round(-math.log10(1 - p)))}" if p > 0.9995 else (
        f"10⁻{_raised(round(-math.log10(p)))}" if p < 0.0005 else f"{100 * p:.4g}%"
    )  # fmt: skip


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _points(xs: NDArray[np.floating], ys: NDArray[np.floating]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))
