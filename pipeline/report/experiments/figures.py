"""What the figures of all experiments share: colours, axes without ornament, dots by seed, labels that keep apart."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import isotonic_regression

from pipeline.storage.files import whole_file

# Okabe and Ito's palette: told apart by every eye
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def pyplot() -> Any:
    """matplotlib's, without a screen; imported when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@contextmanager
def new_figure(path: Path, *, dpi: int = 140, colours: int | None = None, **settings: Any) -> Iterator[Any]:
    """A figure that is written as PNG, whole or not at all, and closed.

    Args:
        path: of the PNG.
        dpi: its resolution.
        colours: of a palette, which keeps a large PNG small; None: all there are.
        settings: of `plt.figure`.
    """
    plt = pyplot()
    figure = plt.figure(**settings)
    try:
        yield figure
        picture = io.BytesIO()
        figure.savefig(picture, dpi=dpi, format="png")
        with whole_file(path) as temporary:
            if colours is None:
                temporary.write_bytes(picture.getbuffer())
            else:
                image = Image.open(picture).convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE)
                image.save(temporary, format="PNG", optimize=True)
    finally:
        plt.close(figure)


def plain(panel: Any, grid: str | None = "y") -> None:
    """No frame above and at the right, no ticks, a pale grid behind everything."""
    if grid is not None:
        panel.grid(axis=grid, color="0.92")
        panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=0)


def dots(panel: Any, x: float, values: Sequence[float], colour: str, *, bar: str, width: float) -> None:
    """A dot for every seed; their mean as a bar of a colour and half width."""
    panel.scatter([x] * len(values), values, s=20, color=colour, alpha=0.75, linewidth=0, zorder=3)
    panel.hlines(sum(values) / len(values), x - width, x + width, color=bar, linewidth=2.6, zorder=4)


def wrapped(name: str, width: int) -> str:
    """A long name on several lines."""
    return "\n".join(textwrap.wrap(name, width))


def spread(heights: Sequence[float], apart: float, top: float = np.inf) -> list[float]:
    """Increasing heights moved as little as is needed (least squares) to be `apart`, none above `top`."""
    steps = apart * np.arange(len(heights))
    free = isotonic_regression(np.subtract(heights, steps)).x
    places: list[float] = (np.minimum(free, top - steps[-1]) + steps).tolist()
    return places
