"""A comparison of methods over seeds as Markdown, CSV, JSON and a figure."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.statistics import PairedDifference, Summary, paired_difference, summarise
from pipeline.storage.files import whole_file, write_json, write_text


@dataclass(frozen=True)
class MethodRuns:
    """One method: a list of results by seed, in one order for all methods.

    Attributes:
        name: for people.
        results: per seed: top1, top5, nll, ece, seconds, memory_mib.
        paper: the paper's figure as text, or "".
    """

    name: str
    results: list[dict[str, float]]
    paper: str = ""

    def summary(self, key: str) -> Summary:
        """Over seeds."""
        return summarise([result[key] for result in self.results])


@dataclass(frozen=True)
class Comparison:
    """All of a table.

    Attributes:
        title: heading.
        seeds: in the order of every method's results.
        methods: rows.
        differences: (sentence, paired difference in points of top-1).
        notes: sentences below the table.
        command: that makes it.
        extra: further figures, for the JSON.
    """

    title: str
    seeds: list[int]
    methods: list[MethodRuns]
    differences: list[tuple[str, PairedDifference]]
    notes: list[str]
    command: str
    extra: dict[str, Any]

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write STEM.md, .csv, .json and .png; returns their paths."""
        paths = [folder / f"{stem}.{suffix}" for suffix in ("md", "csv", "json", "png")]
        write_text(paths[0], self.markdown(f"{stem}.png"))
        write_text(paths[1], self.csv())
        write_json(paths[2], self.as_json())
        self.figure(paths[3])
        return paths

    def markdown(self, figure: str) -> str:
        """For people."""
        paper = any(method.paper for method in self.methods)
        head = ["", "top-1, %", "NLL, nats", "ECE, %", "training, s", "peak memory, MiB"] + ["paper"] * paper
        lines = [f"# {self.title}", "", _row(head), _row(["---"] * len(head))]
        for method in self.methods:
            nll = method.summary("nll")
            cells = [
                method.name,
                str(method.summary("top1")),
                f"{nll.mean:.3f}" + ("" if nll.std is None else f" ± {nll.std:.3f}"),
                str(method.summary("ece")),
                f"{method.summary('seconds').mean:.0f}",
                f"{method.summary('memory_mib').mean:.0f}",
            ]
            lines.append(_row(cells + [method.paper] * paper))
        n = len(self.seeds)
        lines += [
            "",
            f"n = {n} seed{'s' * (n != 1)} ({', '.join(map(str, self.seeds))}); mean ± standard deviation.",
        ]
        for text, difference in self.differences:
            lines += ["", f"**{text}**: {difference} (points of top-1)."]
        for note in self.notes:
            lines += ["", note]
        lines += ["", f"![top-1 by method and seed]({figure})", "", f"Made by `{self.command}`.", ""]
        return "\n".join(lines)

    def csv(self) -> str:
        """One line per method and seed."""
        text = io.StringIO()
        keys = ["top1", "top5", "nll", "ece", "seconds", "memory_mib"]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "seed", *keys])
        for method in self.methods:
            for seed, result in zip(self.seeds, method.results, strict=True):
                writer.writerow([method.name, seed, *(result[key] for key in keys)])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "format": 1,
            "title": self.title,
            "command": self.command,
            "seeds": self.seeds,
            "methods": {
                m.name: {"top1": vars(m.summary("top1")), "paper": m.paper, "results": m.results} for m in self.methods
            },
            "differences": {text: vars(difference) for text, difference in self.differences},
            "notes": self.notes,
            **json.loads(json.dumps(self.extra)),
        }

    def figure(self, path: Path) -> None:
        """Every seed a dot, the mean a bar, seeds joined by thin lines."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(1.6 + 1.5 * len(self.methods), 4.2), layout="constrained")
        tops = [[result["top1"] for result in method.results] for method in self.methods]
        for of_seed in zip(*tops, strict=True):
            ax.plot(range(len(tops)), of_seed, color="0.8", linewidth=0.8, zorder=1)
        for x, values in enumerate(tops):
            ax.scatter([x] * len(values), values, s=26, color="#3b6ea8", zorder=3, alpha=0.85)
            ax.hlines(sum(values) / len(values), x - 0.28, x + 0.28, color="#c2410c", linewidth=2.5, zorder=2)
        ax.set_xticks(range(len(tops)), [_wrapped(method.name) for method in self.methods], fontsize=8)
        ax.set_ylabel("top-1, %")
        ax.set_title(self.title, fontsize=10)
        ax.margins(x=0.12, y=0.12)
        ax.grid(axis="y", color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        with whole_file(path) as temporary:
            fig.savefig(temporary, dpi=130, format="png")
        plt.close(fig)


def compare(title: str, a: MethodRuns, b: MethodRuns) -> tuple[str, PairedDifference]:
    """The paired difference a − b in top-1."""
    return title, paired_difference([r["top1"] for r in a.results], [r["top1"] for r in b.results])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _wrapped(name: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, 18))
