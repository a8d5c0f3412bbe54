"""`mpl reproduce swapped-teacher`: does the feedback act?

The teacher's distributions have two pairs of classes swapped. A student of the fixed teacher learns the swap;
feedback alone must undo it. With its sign flipped, or its rows shuffled over the batch, it must not.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.models import load_network, save_network
from pipeline.report.experiments.statistics import summarise
from pipeline.report.experiments.table import Comparison, MethodRuns, compare
from stages.execution import Stage
from stages.options import Context
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.commands import comparison_basis, results_of, seed_run, seeds_text, student_steps, upstream

PAIRS = ((0, 1), (2, 3))
SAME_DATA = ("train_reduced.student_data=pool", "train_reduced.feedback.held_out=0")
FIXED = ("train_reduced.teacher=fixed", *SAME_DATA)
ALONE = ("train_reduced.teacher=calibrator", "train_reduced.calibrator.supervised_weight=0", *SAME_DATA)
VARIANTS = {  # name: (label, changes); all with the swapped teacher and on the pool alone
    "fixed": ("Swapped teacher, fixed", FIXED),
    "feedback": ("Swapped teacher, feedback alone", ALONE),
    "flipped": ("Control: sign flipped", (*ALONE, "train_reduced.feedback.control=flipped")),
    "shuffled": ("Control: rows shuffled", (*ALONE, "train_reduced.feedback.control=shuffled")),
    "supervised-term": (
        "Supervised term alone",
        (*ALONE, "train_reduced.calibrator.supervised_weight=1", "train_reduced.feedback.weight=0"),
    ),
    "both": ("Feedback and supervised term", (*ALONE, "train_reduced.calibrator.supervised_weight=1")),
}
UNSWAPPED = "Unswapped teacher, fixed"


def plan(context: Context, seeds: range, jobs: int | None) -> Stage:
    """Plan the experiment as one stage."""
    outputs = [context.run / f"swapped-teacher.{suffix}" for suffix in ("md", "csv", "json", "png")]
    return Stage(
        name="swapped-teacher",
        basis=comparison_basis(context, seeds),
        outputs=outputs,
        work=lambda: work(context, seeds, jobs),
        summary=lambda result: f"won back: {100 * result['won_back']['feedback']:.0f}%; {outputs[0]}",
        replaces=list(outputs),
        cheap=frozenset({"seeds"}),
    )


def work(context: Context, seeds: range, jobs: int | None) -> dict[str, Any]:
    """Run all chains, then write the table."""
    first: dict[int, Chain] = {
        seed: [*upstream(seed_run(context, seed)), *student_steps(seed_run(context, seed), "fixed", FIXED)]
        for seed in seeds
    }
    unswapped = run_chains(context, first, jobs)
    second: dict[int, Chain] = {seed: _swapped_chain(context, seed) for seed in seeds}
    swapped = run_chains(context, second, jobs)
    rows = [MethodRuns(UNSWAPPED, [results_of(unswapped[seed][3:5]) for seed in seeds])]
    for place, (label, _) in enumerate(VARIANTS.values()):
        begin = 2 + 2 * place
        rows.append(MethodRuns(label, [results_of(swapped[seed][begin : begin + 2]) for seed in seeds]))
    fractions = won_back(rows)
    comparison(context, rows, fractions, seeds).write(context.run.root, "swapped-teacher")
    return {"won_back": {name: values["of_means"] for name, values in fractions.items()}}


def _swapped_chain(context: Context, seed: int) -> list[Step]:
    """The stages with a teacher whose outputs are swapped, in a run of their own."""
    source = seed_run(context, seed)
    teacher = source / "teacher-swapped"
    write_swapped(source / "teacher", teacher)
    run = source.with_name(f"{source.name}-swapped")
    steps = [Step("filter", run, (), (("teacher", teacher),)), Step("precompute", run)]
    for name, (_, changes) in VARIANTS.items():
        steps += student_steps(run, name, changes)
    return steps


def write_swapped(source: Path, folder: Path) -> None:
    """Save a copy of a network whose outputs of `PAIRS` are exchanged."""
    network = load_network(source)
    classes = len(network.class_names)
    order = torch.arange(classes)
    for a, b in PAIRS:
        order[[a, b]] = order[[b, a]]
    linear = [m for m in network.model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == classes][-1]
    with torch.no_grad():
        linear.weight.copy_(linear.weight[order].clone())
        linear.bias.copy_(linear.bias[order].clone())
    save_network(folder, network, network.model.state_dict())


def won_back(rows: list[MethodRuns]) -> dict[str, dict[str, Any]]:
    """(variant − fixed) / (unswapped − fixed) in top-1: of the means, and per seed."""
    top = [[result["top1"] for result in row.results] for row in rows]
    unswapped, fixed = top[0], top[1]
    found = {}
    for name, values in zip(list(VARIANTS)[1:], top[2:], strict=True):
        each = [(v - f) / (u - f) for v, f, u in zip(values, fixed, unswapped, strict=True)]
        gain, cost = sum(values) - sum(fixed), sum(unswapped) - sum(fixed)
        found[name] = {"of_means": gain / cost, "per_seed": each}
    return found


def comparison(
    context: Context, rows: list[MethodRuns], fractions: dict[str, dict[str, Any]], seeds: range
) -> Comparison:
    """The table with its sentences."""
    recipe, by_name = context.recipe, {row.name: row for row in rows}
    fixed = by_name[VARIANTS["fixed"][0]]
    lines = [
        "Won back of what the swap costs, (variant − fixed) / (unswapped − fixed), of the means; ± over seeds:",
        "",
    ]
    for name, values in fractions.items():
        each = summarise([100 * value for value in values["per_seed"]])
        spread = "" if each.std is None else f" ± {each.std:.0f}"
        lines.append(f"- {VARIANTS[name][0]}: **{100 * values['of_means']:.0f}%**{spread}")
    classes = " and ".join(f"{a}↔{b}" for a, b in PAIRS)
    notes = [
        "\n".join(lines),
        f"Classes {classes} are exchanged in the teacher's outputs, on pool and labelled images. All students: "
        f"{recipe.train_reduced.model.name}, {recipe.train_reduced.steps:,} steps on batches of "
        f"{recipe.train_reduced.batch} pool images, never a labelled image. Checkpoint: the last step's moving "
        "average. Split: test.",
    ]
    differences = [compare("Feedback alone − fixed", by_name[VARIANTS["feedback"][0]], fixed)]
    command = f"mpl reproduce swapped-teacher --recipe {recipe.name} {seeds_text(seeds)}"
    title = "Does the feedback act? A teacher with two pairs of classes swapped"
    return Comparison(title, list(seeds), rows, differences, notes, command, {"won_back": fractions})
