"""`mpl plan`: a recipe + a cluster → memory, layout and time, before anything is trained."""

import json
from typing import TYPE_CHECKING, Any

import click

from stages.console import Console

if TYPE_CHECKING:
    import torch

    from pipeline.config import Recipe
    from pipeline.data.manifest import Manifest
    from pipeline.plan.choose import Choice, Plan
    from pipeline.plan.cluster import Accelerator, Cluster
    from pipeline.plan.needs import Needs, PlannedMethod

GIB, GB = 2**30, 1e9


@click.command()
@click.option("--recipe", default="digits", show_default=True, help="Recipe: a name or a YAML file.")
@click.option("--set", "changes", multiple=True, metavar="A.B=VALUE", help="Change one setting; repeatable.")
@click.option("--data", envvar="MPL_DATA", show_envvar=True, metavar="DIR|URL", help="Data folder, for own manifests.")
@click.option(
    "--method",
    type=click.Choice(["reduced", "mpl-soft", "mpl-hard", "all"]),
    default="all",
    show_default=True,
    help="Reduced MPL, or full MPL with soft or hard feedback.",
)
@click.option("--accelerators", type=int, default=1, show_default=True, help="How many train together.")
@click.option("--per-node", type=int, help="Of them in one node. [default: 8, or all where there are fewer]")
@click.option(
    "--accelerator",
    metavar="NAME",
    help="One of a known kind: a100-40gb, a100-80gb, h100-80gb, "
    "tpu-v3-core; its figures stand for those that are not given.",
)
@click.option("--memory", type=float, help="Of one accelerator, GiB. [default: of this machine's]")
@click.option("--flops", type=float, help="Of one accelerator at this precision, FLOP/s, as its data sheet has it.")
@click.option("--efficiency", type=float, help="Share of --flops that training reaches. [default: 0.4]")
@click.option("--bandwidth", type=float, help="That an accelerator sends within its node, GB/s. [default: 10]")
@click.option("--between-nodes", type=float, help="That it sends to another node, GB/s. [default: 1]")
@click.option(
    "--headroom",
    type=float,
    default=0.1,
    show_default=True,
    help="Share of the memory left to the framework, kernels' workspace and fragmentation.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure the FLOP/s of this machine on the recipe's network, by a few "
    "plain steps. [default where neither --flops nor --accelerator is given]",
)
@click.option("--device", default="auto", show_default=True, help="Of --calibrate: cpu, cuda, …")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    show_default=True,
    help="bf16: mixed precision.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(
    recipe: str, changes: tuple[str, ...], data: str | None, method: str, accelerators: int, precision: str,
    as_json: bool, **figures: Any,
) -> None:  # fmt: skip
    """Predict the memory and time of a training on a cluster, and choose its layout.

    Reads: the recipe and the data set's manifest. Writes: nothing. Networks are followed without data, so one of a size
    that this machine could never hold takes seconds, the largest minutes. Exit status 1 where nothing fits.
    """
    from pipeline.config import load_recipe
    from pipeline.data.manifest import load_manifest
    from pipeline.plan.choose import plan
    from pipeline.plan.needs import METHODS, all_needs
    from pipeline.storage.files import location

    settings = load_recipe(recipe, changes)
    manifest = load_manifest(settings.data.manifest, location(data) if data else None)
    full = METHODS if settings.train_mpl is not None else METHODS[:1]
    wanted: tuple[PlannedMethod, ...] = full if method == "all" else (method,)  # type: ignore[assignment]
    labelled = _labelled(manifest, settings.data.labelled)
    needs = all_needs(settings, wanted, manifest.classes, precision, labelled, max(1, accelerators))
    cluster = _cluster(needs[0], accelerators, precision, **figures)
    plans = [_planned(plan, each, cluster) for each in needs]
    if as_json:
        click.echo(json.dumps(_as_json(settings, cluster, precision, plans)))
    else:
        click.echo(_as_text(settings, cluster, precision, plans))
    if all(isinstance(found, str) or found.chosen is None for _, found in plans):
        raise SystemExit(1)


def _labelled(manifest: "Manifest", first: int | None) -> int | None:
    """How many labelled images there are at most, as far as manifest and recipe tell."""
    split = manifest.splits["labelled"]
    total = manifest.files[split.source].rows
    own = [split.first, split.last] if total is None else [len(split.rows(total))]
    return min((n for n in [*own, first] if n is not None), default=None)


def _planned(plan: Any, needs: "Needs", cluster: "Cluster") -> "tuple[Needs, Plan | str]":
    """The plan, or in words why there is none: another method may be possible."""
    from pipeline.plan.choose import Impossible

    Console().note(f"{needs.method}: following {needs.student.settings.name} without data")
    try:
        return needs, plan(needs, cluster)
    except Impossible as error:
        return needs, str(error)


def _cluster(
    needs: "Needs", accelerators: int, precision: str, *, accelerator: str | None, per_node: int | None,
    memory: float | None, flops: float | None, efficiency: float | None, bandwidth: float | None,
    between_nodes: float | None, headroom: float, calibrate: bool, device: str,
) -> "Cluster":  # fmt: skip
    """The cluster of the options; what they leave out is the named accelerator's, or this machine's."""
    from pipeline.errors import UsageError
    from pipeline.plan import calibrate as machine
    from pipeline.plan.cluster import Cluster
    from pipeline.plan.cluster import accelerator as named

    known: Accelerator | None = named(accelerator) if accelerator is not None else None
    if flops is not None and calibrate:
        raise UsageError("give --flops or --calibrate, not both")
    if flops is None and known is not None and not calibrate:
        flops = known.bf16 if precision == "bf16" else known.float32
        if flops is None:
            raise UsageError(f"--accelerator {accelerator}: no rate is published for {precision}; give --flops")
    if memory is None:
        memory = known.memory if known is not None else machine.device_memory(_device(device)) / GIB
    proposed = Cluster(  # checks every figure before a measurement that takes a while
        accelerators=accelerators,
        per_node=per_node if per_node is not None else min(8, max(1, accelerators)),
        memory=memory * GIB,
        flops=flops if flops is not None else 1.0,
        efficiency=efficiency if efficiency is not None else (0.4 if flops is not None else 1.0),
        bandwidth=GB * _first(bandwidth, known.bandwidth if known else None, 10.0),
        between_nodes=GB * _first(between_nodes, known.between_nodes if known else None, 1.0),
        headroom=headroom,
    )
    if flops is not None:
        return proposed
    from dataclasses import replace

    where: torch.device = _device(device)
    Console().note(f"measuring the rate of {needs.student.settings.name} on {where.type}")
    return replace(proposed, flops=machine.measured_flops(needs, where, images=min(32, max(2, needs.batch))))


def _device(name: str) -> "torch.device":
    """As `Context.device`, which needs a run."""
    from stages.options import Options, make_context

    return make_context(Options(recipe="digits", device=name)).device


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


# --- for people -----------------------------------------------------------------------------------------


def _as_text(recipe: "Recipe", cluster: "Cluster", precision: str, plans: "list[tuple[Needs, Plan | str]]") -> str:
    lines = [
        f"{recipe.name}: {recipe.data.image_size} px, {plans[0][0].student.classes:,} classes, {precision}",
        f"cluster: {cluster.accelerators:,} accelerator(s), {min(cluster.per_node, cluster.accelerators)} to a node, "
        f"{cluster.memory / GIB:.1f} GiB each ({cluster.usable / GIB:.1f} usable), "
        f"{cluster.flops * cluster.efficiency / 1e12:.3g} TFLOP/s reached, "
        f"{cluster.bandwidth / GB:g} GB/s in a node, {cluster.between_nodes / GB:g} GB/s between nodes",
    ]
    for needs, found in plans:
        lines += ["", _title(needs)]
        if isinstance(found, str):
            lines.append(f"  not possible: {found}")
            continue
        shown = found.chosen or found.leanest
        lines.append(f"  {'layout' if found.chosen else 'DOES NOT FIT; leanest layout'}: {shown.layout.name}")
        if given := _settings(needs, shown):
            lines.append(f"  settings: {' '.join(f'--set {key}={value}' for key, value in given.items())}")
        lines += [f"  {line}" for line in _memory_lines(shown, cluster)]
        lines.append(f"  {_time_line(needs, shown)}")
        lines.append(f"  {_others_line(found)}")
        lines += [f"  → {line}" for line in found.advice]
    return "\n".join(lines)


def _title(needs: "Needs") -> str:
    student = needs.student
    title = f"{needs.method}: {student.settings.name}, {student.parameters / 1e6:.2f} M weights"
    if needs.teacher is not None:
        teacher = needs.teacher.costs
        title += f"; teacher {teacher.settings.name}, {teacher.parameters / 1e6:.2f} M"
        title += f", learns from {needs.teacher.learned:,} images a step"
    return f"{title}; {needs.batch:,} pool images, {needs.feedback_batch:,} labelled ones for feedback"


def _settings(needs: "Needs", choice: "Choice") -> dict[str, str]:
    """What a recipe must say to be trained in this layout."""
    found = {f"distributed.{key}": json.dumps(value).strip('"') for key, value in choice.layout.settings.items()}
    if needs.soft and needs.engine == "exact" and not choice.exact:
        section = "train_reduced.feedback" if needs.method == "reduced" else "train_mpl.feedback_options"
        found[f"{section}.engine"] = "central"
    return found


def _memory_lines(choice: "Choice", cluster: "Cluster") -> list[str]:
    peak = choice.peak
    parts = " + ".join(f"{kind} {_size(size)}" for kind, size in peak.memory.items())
    return [f"memory: {_size(peak.total)} of {_size(cluster.usable)}, in the {peak.name}", f"  = {parts}"]


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def _time_line(needs: "Needs", choice: "Choice") -> str:
    low, high = choice.step_seconds
    span = _seconds(high) if high < 1.05 * low else f"{_seconds(low)} to {_seconds(high)}"
    whole = f"{_seconds(low * choice.steps)}" + ("" if high < 1.05 * low else f" to {_seconds(high * choice.steps)}")
    kind = ""
    if needs.soft:
        kind = "; exact feedback" if choice.exact else "; feedback by finite differences"
    return (
        f"a step: {span} (compute {_seconds(choice.compute)}, communication {_seconds(choice.communication)}"
        f"{kind}), {needs.batch / high:,.4g} images/s; {choice.steps:,} steps: {whole}"
    )


def _seconds(value: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def _others_line(found: "Plan") -> str:
    others = [choice for choice in found.considered if choice is not (found.chosen or found.leanest)]
    others = sorted(others, key=lambda choice: (not choice.fits, sum(choice.step_seconds)))[:3]
    told = "; ".join(
        f"{choice.layout.name} ({_size(choice.peak.total)}, "
        + (f"{_seconds(choice.step_seconds[1])})" if choice.fits else "does not fit)")
        for choice in others
    )
    return f"also considered: {told or 'nothing'}"


# --- for programs ---------------------------------------------------------------------------------------


def _as_json(
    recipe: "Recipe", cluster: "Cluster", precision: str, plans: "list[tuple[Needs, Plan | str]]"
) -> dict[str, Any]:
    from dataclasses import asdict

    found: dict[str, Any] = {"recipe": recipe.name, "precision": precision, "cluster": asdict(cluster), "methods": {}}
    for needs, result in plans:
        if isinstance(result, str):
            found["methods"][needs.method] = {"fits": False, "reason": result}
            continue
        teacher = needs.teacher
        found["methods"][needs.method] = {
            "fits": result.chosen is not None,
            "student_parameters": needs.student.parameters,
            "teacher_parameters": teacher.costs.parameters if teacher is not None else 0,
            "batch": needs.batch,
            "chosen": _choice_as_json(needs, result.chosen) if result.chosen is not None else None,
            "leanest": _choice_as_json(needs, result.leanest),
            "considered": [_choice_as_json(needs, choice) for choice in result.considered],
            "advice": result.advice,
        }
    return found


def _choice_as_json(needs: "Needs", choice: "Choice") -> dict[str, Any]:
    from dataclasses import asdict

    low, high = choice.step_seconds
    return asdict(choice.layout) | {
        "layout": choice.layout.name,
        "settings": _settings(needs, choice),
        "fits": choice.fits,
        "bytes": choice.peak.total,
        "phase": choice.peak.name,
        "memory": choice.peak.memory,
        "phases": {phase.name: phase.total for phase in choice.phases},
        "flops": choice.flops,
        "compute_seconds": choice.compute,
        "communication_seconds": choice.communication,
        "step_seconds": [low, high],
        "training_seconds": [low * choice.steps, high * choice.steps],
        "exact_feedback": choice.exact,
    }
