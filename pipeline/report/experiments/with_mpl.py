"""Methods alone and as the teacher of Meta Pseudo Labels, as Markdown, CSV, JSON and a figure: tables 1 and 10."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.cells import DIFFERENCE, difference_cells, of_seeds, small, table
from pipeline.report.experiments.statistics import (
    PairedDifference,
    Summary,
    holm,
    p_value,
    paired_difference,
    summarise,
)
from pipeline.storage.files import whole_file, write_json, write_text

FIGURES = ("top1", "trained_top1", "validation_top1", "top5", "nll", "ece", "seconds", "memory_mib")
Results = list[dict[str, float]]  # by seed
BLUE, ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: for people.
        alone: by seed: top1, trained_top1 (before finetuning), top5, nll, ece, seconds, memory_mib.
        mpl: the same of the student of Meta Pseudo Labels; None: the paper has none either.
        paper: the paper's figures, a text for each data set.
    """

    name: str
    alone: Results
    mpl: Results | None
    paper: tuple[str, ...]

    def top1(self, mpl: bool, key: str = "top1") -> Summary:
        """Over seeds, percent."""
        results = self.mpl if mpl else self.alone
        assert results is not None
        return summarise([result[key] for result in results])

    def difference(self, key: str = "top1") -> PairedDifference:
        """With MPL − alone, points of top-1, paired by seed; `key` is of the student with MPL."""
        assert self.mpl is not None
        return paired_difference([r[key] for r in self.mpl], [r["top1"] for r in self.alone])


@dataclass(frozen=True)
class WithMpl:
    """All of the table.

    Attributes:
        title: heading.
        seeds: in the order of all results.
        rows: methods.
        papers: data sets of the paper's columns.
        notes: paragraphs below the tables.
        command: that makes it.
        extra: further figures, for the JSON.
    """

    title: str
    seeds: list[int]
    rows: list[Row]
    papers: tuple[str, ...]
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

    def adjusted(self, key: str = "top1") -> dict[str, float]:
        """p of every difference, adjusted for their number (Holm); `key` is of the student with MPL."""
        pairs = [row for row in self.rows if row.mpl is not None]
        found = holm([p_value(row.difference(key)) for row in pairs])
        return dict(zip([row.name for row in pairs], found, strict=True))

    def markdown(self, figure: str) -> str:
        """For people."""
        return "\n\n".join(
            [
                f"# {self.title}",
                self.answer(),
                self._main(),
                f"{of_seeds(self.seeds)}; top-1 in %, mean ± standard deviation. Difference: X + MPL − X in points, "
                "paired by seed, with the 95% interval of the t-distribution; Holm: p adjusted for all "
                f"{len(self.adjusted())} differences together, **bold** where below 0.05. Before finetuning: the same "
                "difference, at equal steps, its p adjusted likewise.",
                f"![top-1 alone and with MPL, by seed]({figure})",
                self._details(),
                *self.notes,
                f"Made by `{self.command}`.",
                "",
            ]
        )

    def answer(self) -> str:
        """What the differences say, in two sentences."""
        return (
            f"With MPL on top and finetuned, {self._kinds('top1')}. "
            f"Before finetuning, at equal steps, {self._kinds('trained_top1')}."
        )

    def _kinds(self, key: str) -> str:
        kinds: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        adjusted = self.adjusted(key)
        for row in self.rows:
            if row.mpl is None:
                continue
            d = row.difference(key)
            kind = "undecided" if adjusted[row.name] >= 0.05 else "better" if d.mean > 0 else "worse"
            kinds[kind].append(f"{row.name} ({d.mean:+.2f})")
        return "; ".join(f"{kind}: {', '.join(of)}" for kind, of in kinds.items() if of)

    def _main(self) -> str:
        head = ["", "alone", "with MPL", *DIFFERENCE, "before finetuning", *(f"paper, {name}" for name in self.papers)]
        adjusted, before, rows = self.adjusted(), self.adjusted("trained_top1"), []
        for row in self.rows:
            cells = [row.name, str(row.top1(False))]
            if row.mpl is None:
                cells += ["–"] * 6
            else:
                cells += [str(row.top1(True)), *difference_cells(row.difference(), adjusted[row.name])]
                mean, interval, _, p = difference_cells(row.difference("trained_top1"), before[row.name])
                cells.append(mean if interval == "–" else f"{mean} {interval}, p {p}")
            rows.append([*cells, *row.paper])
        return table(head, rows)

    def _details(self) -> str:
        head = ["student", "before finetuning", "top-1, %", "NLL, nats", "ECE, %", "training, s", "peak memory, MiB"]
        rows = []
        for row in self.rows:
            for name, results in ((row.name, row.alone), (f"{row.name} + MPL", row.mpl)):
                if results is None:
                    continue
                of = {key: summarise([result[key] for result in results]) for key in FIGURES}
                before = str(of["trained_top1"]) if results is row.mpl else "–"
                cells = [name, before, str(of["top1"]), small(of["nll"]), str(of["ece"])]
                rows.append([*cells, f"{of['seconds'].mean:.0f}", f"{of['memory_mib'].mean:.0f}"])
        return table(head, rows)

    def csv(self) -> str:
        """One line per student and seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "mpl", "seed", *FIGURES])
        for row in self.rows:
            for mpl, results in (("no", row.alone), ("yes", row.mpl)):
                for seed, result in zip(self.seeds, results or [], strict=False):
                    writer.writerow([row.name, mpl, seed, *(result[key] for key in FIGURES)])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        adjusted, before = self.adjusted(), self.adjusted("trained_top1")
        methods = {}
        for row in self.rows:
            entry: dict[str, Any] = {"alone": row.alone, "paper": dict(zip(self.papers, row.paper, strict=True))}
            if row.mpl is not None:
                entry["mpl"] = row.mpl
                entry["difference"] = vars(row.difference()) | {"holm": adjusted[row.name]}
                entry["difference_before_finetuning"] = vars(row.difference("trained_top1")) | {
                    "holm": before[row.name]
                }
            methods[row.name] = entry
        return {
            "format": 1,
            "title": self.title,
            "command": self.command,
            "seeds": self.seeds,
            "methods": methods,
            "notes": self.notes,
            **json.loads(json.dumps(self.extra)),
        }

    def figure(self, path: Path) -> None:
        """Every seed a dot, alone and with MPL side by side and joined; means as bars."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(1.8 + 1.15 * len(self.rows), 4.6), layout="constrained")
        for x, row in enumerate(self.rows):
            sides = [(x - 0.16 if row.mpl else x, row.alone, BLUE)]
            if row.mpl is not None:
                sides.append((x + 0.16, row.mpl, ORANGE))
                for alone, mpl in zip(row.alone, row.mpl, strict=True):
                    ax.plot([x - 0.16, x + 0.16], [alone["top1"], mpl["top1"]], color="0.8", linewidth=0.8, zorder=1)
            for place, results, colour in sides:
                tops = [result["top1"] for result in results]
                ax.scatter([place] * len(tops), tops, s=20, color=colour, alpha=0.75, linewidth=0, zorder=3)
                mean = sum(tops) / len(tops)
                ax.hlines(mean, place - 0.13, place + 0.13, color=colour, linewidth=2.6, zorder=4)
        ax.scatter([], [], color=BLUE, label="alone")
        ax.scatter([], [], color=ORANGE, label="with MPL on top")
        ax.legend(frameon=False, fontsize=9, loc="lower right", ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0.2)
        names = [row.name.replace(" ", "\n") for row in self.rows]
        ax.set_xticks(range(len(names)), names, fontsize=8.5)
        ax.set_ylabel("top-1 on the test split, %")
        ax.set_title(self.title, fontsize=11, loc="left")
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=0)
        with whole_file(path) as temporary:
            fig.savefig(temporary, dpi=140, format="png")
        plt.close(fig)
