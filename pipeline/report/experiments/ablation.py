"""An ablation: variants of one method against the same reference, as Markdown, CSV, JSON and a figure."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.experiments.cells import DIFFERENCE, difference_cells, of_seeds, small, table
from pipeline.report.experiments.statistics import PairedDifference, holm, p_value, paired_difference, summarise
from pipeline.report.experiments.with_mpl import FIGURES, ORANGE, Results
from pipeline.storage.files import whole_file, write_json, write_text

WIDE = 25.0  # points: beyond this the figure's scale is linear to 5 points and logarithmic from there
TICKS = (-80, -40, -20, -10, -5, -2, 0, 2, 5, 10, 20, 40, 80)  # of such a panel


@dataclass(frozen=True)
class Group:
    """Variants that are alike in all but one thing.

    Attributes:
        title: for people.
        results: variant → by seed, as of `pipeline.report.experiments.with_mpl`.
        reference: the variant that the tested ones are compared with.
        tested: variants whose difference from the reference is the question.
        finetuned: variants that have figures before finetuning as well.
    """

    title: str
    results: dict[str, Results]
    reference: str
    tested: tuple[str, ...]
    finetuned: tuple[str, ...]

    def difference(self, variant: str, key: str = "top1") -> PairedDifference:
        """Variant − reference, points of top-1, paired by seed."""
        of = self.results
        return paired_difference([r[key] for r in of[variant]], [r[key] for r in of[self.reference]])


@dataclass(frozen=True)
class Ablation:
    """All of an ablation.

    Attributes:
        title: heading.
        seeds: in the order of all results.
        groups: with a table each; their tested differences are judged together.
        sections: Markdown below the tables: further figures and what they say.
        notes: paragraphs at the end.
        command: that makes it.
        extra: further figures, for the JSON.
    """

    title: str
    seeds: list[int]
    groups: tuple[Group, ...]
    sections: list[str]
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

    def adjusted(self) -> dict[tuple[str, str], float]:
        """(group, variant) → p of its difference, adjusted for the number of all that are tested (Holm)."""
        tests = [(group, variant) for group in self.groups for variant in group.tested]
        found = holm([p_value(group.difference(variant)) for group, variant in tests])
        return {(group.title, variant): p for (group, variant), p in zip(tests, found, strict=True)}

    def answers(self) -> list[str]:
        """A sentence for each group: what the first tested variant adds."""
        lines = []
        for group in self.groups:
            variant = group.tested[0]
            line = f"**{group.title}: {variant} − {group.reference}**: {group.difference(variant)} (points of top-1)."
            if group.finetuned:
                line += f" Before finetuning: {group.difference(variant, 'trained_top1')}."
            lines.append(line)
        return lines

    def markdown(self, figure: str) -> str:
        """For people."""
        tables = [f"{group.title}:\n\n{self._table(group)}" for group in self.groups]
        return "\n\n".join(
            [
                f"# {self.title}",
                *self.answers(),
                f"![differences in top-1 by seed]({figure})",
                *tables,
                f"{of_seeds(self.seeds)}; top-1 in %, mean ± standard deviation. Differences from the reference in "
                "points, paired by seed, with the 95% interval of the t-distribution; Holm: p adjusted for all "
                f"{len(self.adjusted())} tested differences together, **bold** where below 0.05.",
                *self.sections,
                *self.notes,
                f"Made by `{self.command}`.",
                "",
            ]
        )

    def _table(self, group: Group) -> str:
        head = ["", "top-1, %", *DIFFERENCE, *(["before finetuning"] if group.finetuned else []), "NLL, nats", "ECE, %",
                "training, s"]  # fmt: skip
        adjusted, rows = self.adjusted(), []
        for variant, results in group.results.items():
            of = {key: summarise([result[key] for result in results]) for key in FIGURES}
            cells = [variant, str(of["top1"])]
            if variant == group.reference:
                cells += ["reference", "", "", ""]
            else:
                cells += difference_cells(group.difference(variant), adjusted.get((group.title, variant)))
            if group.finetuned:
                cells.append(str(of["trained_top1"]) if variant in group.finetuned else "–")
            rows.append([*cells, small(of["nll"]), str(of["ece"]), f"{of['seconds'].mean:.0f}"])
        return table(head, rows)

    def csv(self) -> str:
        """One line per group, variant and seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["group", "variant", "seed", *FIGURES])
        for group in self.groups:
            for variant, results in group.results.items():
                for seed, result in zip(self.seeds, results, strict=True):
                    writer.writerow([group.title, variant, seed, *(result[key] for key in FIGURES)])
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        adjusted = self.adjusted()
        groups = [
            {
                "title": group.title,
                "reference": group.reference,
                "results": group.results,
                "differences": {
                    variant: vars(group.difference(variant))
                    | {"holm": adjusted.get((group.title, variant))}
                    | {"before_finetuning": vars(group.difference(variant, "trained_top1"))}
                    for variant in group.results
                    if variant != group.reference
                },
            }
            for group in self.groups
        ]
        return {
            "format": 1,
            "title": self.title,
            "command": self.command,
            "seeds": self.seeds,
            "groups": groups,
            "notes": self.notes,
            **json.loads(json.dumps(self.extra)),
        }

    def figure(self, path: Path) -> None:
        """Differences from the reference: every seed a dot, mean and interval; a panel for each group."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        counts = [len(group.results) - 1 for group in self.groups]
        fig, panels = plt.subplots(
            1, len(self.groups), figsize=(1.6 + 1.35 * sum(counts), 4.4), width_ratios=counts, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for panel, group in zip(panels[0], self.groups, strict=True):
            variants = [variant for variant in group.results if variant != group.reference]
            panel.axhline(0, color="black", linewidth=1, zorder=1)
            for x, variant in enumerate(variants):
                d = group.difference(variant)
                pairs = zip(group.results[variant], group.results[group.reference], strict=True)
                dots = [a["top1"] - b["top1"] for a, b in pairs]
                panel.scatter([x + 0.14] * len(dots), dots, s=18, color="0.6", linewidth=0, zorder=2)
                colour = ORANGE if variant in group.tested else "0.35"
                reach = None if d.low is None or d.high is None else [[d.mean - d.low], [d.high - d.mean]]
                panel.errorbar([x - 0.1], [d.mean], yerr=reach, color=colour, marker="o", markersize=7, capsize=4,
                               elinewidth=2, zorder=3)  # fmt: skip
            if max(map(abs, panel.get_ylim())) > WIDE:  # a control at chance would hide the rest
                panel.set_yscale("symlog", linthresh=5)
                low, high = panel.get_ylim()
                panel.set_yticks([tick for tick in TICKS if 1.3 * low < tick < 1.3 * high])
                panel.set_ylim(min(1.3 * low, -3), max(1.3 * high, 3))
                panel.yaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if tick else "0")
                panel.minorticks_off()
            panel.set_xticks(range(len(variants)), [_lines(variant) for variant in variants], fontsize=8.5)
            panel.set_xlim(-0.5, len(variants) - 0.5)
            panel.set_title(f"{group.title}\ndifference from “{group.reference}”", fontsize=10, loc="left")
            panel.grid(axis="y", color="0.92")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(length=0)
        panels[0, 0].set_ylabel("points of top-1 on the test split")
        with whole_file(path) as temporary:
            fig.savefig(temporary, dpi=140, format="png")
        plt.close(fig)


def _lines(name: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, 13))
