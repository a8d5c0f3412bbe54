"""`mpl plan`: a recipe + a cluster → memory, layout and time, before anything is trained."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from pipeline.config import Recipe, load_recipe
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import UsageError
from pipeline.plan.calibrate import device_memory, measured_flops
from pipeline.plan.choose import Choice, Plan, plan
from pipeline.plan.cluster import Cluster, accelerator
from pipeline.plan.needs import METHODS, Needs, needs_of
from pipeline.plan.predict import Impossible
from pipeline.plan.step import PlannedMethod, TeacherSettings, network_sizes
from pipeline.storage.files import location
from stages.console import Console
from stages.options import Options, make_context

GIB, GB = 2**30, 1e9
Planned = tuple[Needs, Plan | str]  # the plan, or in words why there is none


@dataclass(frozen=True)
class ClusterOptions:
    """The options of the command line that tell of the cluster; None: the named accelerator's, or this machine's."""

    accelerators: int
    per_node: int | None
    accelerator: str | None
    memory: float | None
    flops: float | None
    efficiency: float | None
    bandwidth: float | None
    between_nodes: float | None
    headroom: float
    calibrate: bool
    device: str


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
    recipe: str, changes: tuple[str, ...], data: str | None, method: str, precision: str, as_json: bool, **figures: Any
) -> None:  # fmt: skip
    """Predict the memory and time of a training on a cluster, and choose its layout.

    Reads: the recipe and the data set's manifest. Writes: nothing. A step of each training is run without data, so one
    of a size that this machine could never hold takes seconds, the largest minutes. Exit status 1 where nothing fits.
    """
    options = ClusterOptions(**figures)
    settings = load_recipe(recipe, changes)
    manifest = load_manifest(settings.data.manifest, location(data) if data else None)
    full = METHODS if settings.train_mpl is not None else METHODS[:1]
    wanted: tuple[PlannedMethod, ...] = full if method == "all" else (method,)  # type: ignore[assignment]
    labelled = _labelled(manifest, settings.data.labelled or manifest.splits["labelled"].draw)
    needs = [
        needs_of(settings, each, manifest.classes, precision, labelled, max(1, options.accelerators)) for each in wanted
    ]
    cluster = _cluster(needs[0], precision, options)
    plans = [_planned(each, cluster) for each in needs]
    if as_json:
        click.echo(json.dumps(_as_json(settings, cluster, precision, plans)))
    else:
        click.echo(_as_text(settings, cluster, precision, plans))
    if all(isinstance(planned, str) or planned.chosen is None for _, planned in plans):
        raise SystemExit(1)


def _labelled(manifest: Manifest, drawn: int | None) -> int | None:
    """How many labelled images there are at most, as far as manifest and recipe tell."""
    split = manifest.splits["labelled"]
    total = manifest.files[split.source].rows
    own = [split.first, split.last] if total is None else [len(split.rows(total))]
    return min((n for n in [*own, drawn] if n is not None), default=None)


def _planned(needs: Needs, cluster: Cluster) -> Planned:
    """The plan, or in words why there is none: another method may be possible."""
    Console().note(f"{needs.settings.method}: running a step of {needs.settings.student.name} without data")
    try:
        return needs, plan(needs, cluster)
    except Impossible as error:
        return needs, str(error)


def _cluster(needs: Needs, precision: str, options: ClusterOptions) -> Cluster:
    """The cluster of the options; what they leave out is the named accelerator's, or this machine's."""
    known = accelerator(options.accelerator) if options.accelerator is not None else None
    flops, memory = options.flops, options.memory
    if flops is not None and options.calibrate:
        raise UsageError("give --flops or --calibrate, not both")
    if flops is None and known is not None and not options.calibrate:
        flops = known.bf16 if precision == "bf16" else known.float32
        if flops is None:
            raise UsageError(f"--accelerator {options.accelerator}: no rate is published for {precision}; give --flops")
    if memory is None:
        memory = known.memory if known is not None else device_memory(_device(options.device)) / GIB
    proposed = Cluster(  # checks every figure before a measurement that takes a while
        accelerators=options.accelerators,
        per_node=options.per_node if options.per_node is not None else min(8, max(1, options.accelerators)),
        memory=memory * GIB,
        flops=flops if flops is not None else 1.0,
        efficiency=_first(options.efficiency, 0.4 if flops is not None else 1.0),
        bandwidth=GB * _first(options.bandwidth, known.bandwidth if known else None, 10.0),
        between_nodes=GB * _first(options.between_nodes, known.between_nodes if known else None, 1.0),
        headroom=options.headroom,
    )
    if flops is not None:
        return proposed
    device = _device(options.device)
    Console().note(f"measuring the rate of {needs.settings.student.name} on {device.type}")
    images = min(32, max(2, needs.images.pool))
    return replace(proposed, flops=measured_flops(needs.settings, device, images=images))


def _device(name: str) -> torch.device:
    """As `Context.device`, which needs a run."""
    return make_context(Options(recipe="digits", device=name)).device


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


# --- for people -----------------------------------------------------------------------------------------


def _as_text(recipe: Recipe, cluster: Cluster, precision: str, plans: list[Planned]) -> str:
    lines = [
        f"{recipe.name}: {recipe.data.image_size} px, {plans[0][0].settings.classes:,} classes, {precision}",
        f"cluster: {cluster.accelerators:,} accelerator(s), {min(cluster.per_node, cluster.accelerators)} to a node, "
        f"{cluster.memory / GIB:.1f} GiB each ({cluster.usable / GIB:.1f} usable), "
        f"{cluster.flops * cluster.efficiency / 1e12:.3g} TFLOP/s reached, "
        f"{cluster.bandwidth / GB:g} GB/s in a node, {cluster.between_nodes / GB:g} GB/s between nodes",
    ]
    for needs, planned in plans:
        lines += ["", _title(needs)]
        if isinstance(planned, str):
            lines.append(f"  not possible: {planned}")
            continue
        shown = planned.chosen or planned.leanest
        lines.append(f"  {'layout' if planned.chosen else 'DOES NOT FIT; leanest layout'}: {shown.layout.name}")
        if section := _settings(needs, shown):
            lines.append(f"  settings: {' '.join(f'--set {key}={value}' for key, value in section.items())}")
        lines += [f"  {line}" for line in _memory_lines(shown, cluster)]
        lines.append(f"  {_time_line(needs, shown)}")
        lines.append(f"  {_others_line(planned)}")
        lines += [f"  → {line}" for line in planned.advice]
    return "\n".join(lines)


def _title(needs: Needs) -> str:
    settings, images, sizes = needs.settings, needs.images, network_sizes(needs.settings)
    title = f"{settings.method}: {settings.student.name}, {sizes['student'].trainable / 1e6:.2f} M weights"
    if isinstance(settings.teacher, TeacherSettings):
        title += f"; teacher {settings.teacher.model.name}, {sizes['teacher'].trainable / 1e6:.2f} M"
        title += f", learns from {images.lesson:,} images a step"
    return f"{title}; {images.pool:,} pool images, {images.feedback:,} labelled ones for feedback"


def _settings(needs: Needs, choice: Choice) -> dict[str, str]:
    """What a recipe must say to be trained in this layout."""
    section = {f"distributed.{key}": json.dumps(value).strip('"') for key, value in choice.layout.settings.items()}
    settings = needs.settings
    if settings.soft and settings.engine == "exact" and not choice.exact:
        key = "train_reduced.feedback" if settings.method == "reduced" else "train_mpl.feedback_options"
        section[f"{key}.engine"] = "central"
    return section


def _memory_lines(choice: Choice, cluster: Cluster) -> list[str]:
    peak = choice.peak
    parts = " + ".join(f"{kind} {_size(size)}" for kind, size in peak.memory.items())
    return [f"memory: {_size(peak.total)} of {_size(cluster.usable)}, in the {peak.name}", f"  = {parts}"]


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def _time_line(needs: Needs, choice: Choice) -> str:
    low, high = choice.step_seconds
    span = _seconds(high) if high < 1.05 * low else f"{_seconds(low)} to {_seconds(high)}"
    whole = f"{_seconds(low * choice.steps)}" + ("" if high < 1.05 * low else f" to {_seconds(high * choice.steps)}")
    kind = ""
    if needs.settings.soft:
        kind = "; exact feedback" if choice.exact else "; feedback by finite differences"
    return (
        f"a step: {span} (compute {_seconds(choice.compute)}, communication {_seconds(choice.communication)}"
        f"{kind}), {needs.images.pool / high:,.4g} images/s; {choice.steps:,} steps: {whole}"
    )


def _seconds(value: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def _others_line(planned: Plan) -> str:
    others = [choice for choice in planned.considered if choice is not (planned.chosen or planned.leanest)]
    others = sorted(others, key=lambda choice: (not choice.fits, sum(choice.step_seconds)))[:3]
    text = "; ".join(
        f"{choice.layout.name} ({_size(choice.peak.total)}, "
        + (f"{_seconds(choice.step_seconds[1])})" if choice.fits else "does not fit)")
        for choice in others
    )
    return f"also considered: {text or 'nothing'}"


# --- for programs ---------------------------------------------------------------------------------------


def _as_json(recipe: Recipe, cluster: Cluster, precision: str, plans: list[Planned]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for needs, planned in plans:
        method = needs.settings.method
        if isinstance(planned, str):
            methods[method] = {"fits": False, "reason": planned}
            continue
        sizes = network_sizes(needs.settings)
        methods[method] = {
            "fits": planned.chosen is not None,
            "student_parameters": sizes["student"].trainable,
            "teacher_parameters": sizes["teacher"].trainable if "teacher" in sizes else 0,
            "batch": needs.images.pool,
            "chosen": _choice_as_json(needs, planned.chosen) if planned.chosen is not None else None,
            "leanest": _choice_as_json(needs, planned.leanest),
            "considered": [_choice_as_json(needs, choice) for choice in planned.considered],
            "advice": planned.advice,
        }
    return {"recipe": recipe.name, "precision": precision, "cluster": asdict(cluster), "methods": methods}


def _choice_as_json(needs: Needs, choice: Choice) -> dict[str, Any]:

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
