"""The two moons as a figure: decision regions, accuracies of all draws, cosines of gradients."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import whole_file
from pipeline.moons.data import make_moons
from pipeline.moons.settings import LABELS, MethodName
from pipeline.moons.study import CellResult, Row, X, Y, grid

SHOWN: tuple[MethodName, ...] = ("supervised", "pseudo_labels", "mpl", "uda", "mpl_uda", "all_labels")
ROWS = ("paper", "working")  # whose regions are shown
DRAW = 0  # whose regions are shown: fixed before anything was run
CLUSTERS = ("#0072B2", "#D55E00")  # Okabe and Ito's palette: told apart by the colour-blind
LINES: dict[MethodName, str] = {
    "supervised": "#000000", "pseudo_labels": "#CC79A7", "mpl": "#D55E00", "uda": "#56B4E9", "mpl_uda": "#0072B2",
    "all_labels": "#8A8A8A",
}  # fmt: skip
TITLES = {"paper": "Paper's settings", "working": "Larger start and steps"}


def draw(study: list[Row], results: dict[str, CellResult], path: Path) -> None:
    """Write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in study if row.name in ROWS] or study[:1]
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        fig: Any = plt.figure(figsize=(12.4, 1.42 * len(shown) + 3.9), layout="constrained")
        upper, lower = fig.subfigures(2, 1, height_ratios=[1.42 * len(shown) + 0.6, 3.3])
        _regions(upper, shown, results)
        _curves(lower, shown[-1], results)
        with whole_file(path) as temporary:
            fig.savefig(temporary, dpi=100, format="png", pil_kwargs={"optimize": True})
        plt.close(fig)


def _regions(fig: Any, shown: list[Row], results: dict[str, CellResult]) -> None:
    from matplotlib.colors import ListedColormap

    axes = fig.subplots(len(shown), len(SHOWN), squeeze=False, sharex=True, sharey=True)
    pale = ListedColormap(["#CFE3F1", "#F8DCC8"])
    x, y = grid()
    for row, line in zip(shown, axes, strict=True):
        moons = make_moons((DRAW,), row.settings)
        points, clusters = moons.points[0].numpy(), moons.clusters[0].numpy()
        stars, labels = (part.numpy() for part in moons.labels)
        for method, ax in zip(SHOWN, line, strict=True):
            found = results[f"{row.name}/{method}"]
            p = found.regions[DRAW].astype(np.float32)
            ax.contourf(x, y, p, levels=[-1, 0.5, 2], cmap=pale)
            if p.min() < 0.5 < p.max():
                ax.contour(x, y, p, levels=[0.5], colors="black", linewidths=1.1)
            for cluster, color in enumerate(CLUSTERS):
                ax.scatter(*points[clusters == cluster][::4].T, s=1.6, color=color, linewidths=0, rasterized=True)
                mine = stars[labels == cluster].T
                ax.scatter(*mine, s=95, marker="*", color=color, edgecolors="white", linewidths=0.9, zorder=4)
            good = sum(found.successes(row.settings))
            text = f"{good} of {len(found.accuracy)}"
            ax.text(0.97, 0.95, text, transform=ax.transAxes, ha="right", va="top", fontsize=10, weight="bold")
            ax.set(xticks=[], yticks=[], xlim=X, ylim=Y, aspect="equal")
            ax.spines[:].set_visible(False)
            if row is shown[0]:
                ax.set_title(LABELS[method], weight="bold")
        line[0].set_ylabel(f"{TITLES.get(row.name, row.name)}\nweights ±{row.settings.init:g}, lr {row.settings.lr:g}")
    n = len(next(iter(results.values())).accuracy)
    fig.suptitle(
        f"Six labels (stars), 2,000 points: draw {DRAW}; in the corner, how many of {n} draws are separated",
        fontsize=11.5, x=0.01, ha="left",
    )  # fmt: skip


def _curves(fig: Any, row: Row, results: dict[str, CellResult]) -> None:
    strip, labelled, true = fig.subplots(1, 3, width_ratios=[1.15, 1, 1])
    for place, method in enumerate(SHOWN):
        values = np.array(results[f"{row.name}/{method}"].accuracy)
        spread = np.random.RandomState(0).uniform(-0.22, 0.22, len(values))  # so that equal dots are all seen
        strip.scatter(values, -place + spread, s=16, color=LINES[method], alpha=0.75, linewidths=0)
        strip.plot([values.mean()] * 2, [-place - 0.33, -place + 0.33], color="black", linewidth=1.8)
    strip.axvline(100 * row.settings.success, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    strip.set_yticks([-place for place in range(len(SHOWN))], [LABELS[m] for m in SHOWN])
    strip.tick_params(axis="y", length=0)
    strip.set_xlabel(f"accuracy, %; dashed: separated (≥ {100 * row.settings.success:.0f})")
    strip.set_title("Every draw, and the mean", loc="left")
    panels = (
        (labelled, "cosine_labelled", "… and on the six labels"),
        (true, "cosine_true", "… and on all true labels"),
    )
    for ax, name, title in panels:
        _cosines(ax, row, results, name)
        ax.set_title(title, loc="left")
        ax.set_xlabel("step")
    labelled.set_ylabel("cosine, mean of the draws")
    head = f"{TITLES.get(row.name, row.name)}; right: the student's gradient on its training loss …"
    fig.suptitle(head, fontsize=11.5, x=0.01, ha="left")


def _cosines(ax: Any, row: Row, results: dict[str, CellResult], name: str) -> None:
    ends = []
    for method in SHOWN:
        result = results[f"{row.name}/{method}"]
        mean = getattr(result, name).mean(axis=1)
        ax.plot(result.steps, mean, color=LINES[method], linewidth=1.6)
        ends.append((float(mean[-1]), method))
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_ylim(-0.55, 1.08)
    last = results[f"{row.name}/{SHOWN[0]}"].steps[-1]
    ax.set_xlim(0, last)
    ax.set_xticks([0, last // 2, last], [f"{v:,}" for v in (0, last // 2, last)])
    for (_, method), place in zip(sorted(ends), apart([end for end, _ in sorted(ends)], 0.125, 1.04), strict=True):
        ax.annotate(LABELS[method], (last, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
                    color=LINES[method], annotation_clip=False)  # fmt: skip


def apart(values: list[float], gap: float, top: float) -> list[float]:
    """Places near ascending values, at least `gap` apart and none above `top`."""
    places = list(values)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places and places[-1] > top:
        places[-1] = top
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    return places
