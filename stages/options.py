"""The options that every stage takes, and the context they make."""

import functools
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config import Recipe, apply_changes, load_recipe, parse_recipe
from pipeline.data.manifest import load_manifest, own_manifest
from pipeline.errors import RecipeError, UsageError
from pipeline.storage.files import Location, location, storage_errors
from pipeline.storage.runs import Run
from stages.console import Console

if TYPE_CHECKING:
    import torch

    from pipeline.assembly import Assembly
    from pipeline.data.dataset import DataSet
    from pipeline.distributed import Ranks
    from pipeline.distributed.placement import Placement

DEFAULT_RECIPE = "digits"
DEFAULT_RUN = Path("runs/default")
LARGEST = 96  # pixels, of images whose size nobody chose: the default networks are made for small ones


@dataclass(frozen=True)
class Context:
    """What a stage works with. `store` is where the large outputs lie: scores/, rejected/, targets/."""

    run: Run
    recipe: Recipe
    seed: int
    data: Location | None
    device_name: str
    precision: str
    console: Console
    store: Location
    force: bool = False
    dry_run: bool = False
    as_json: bool = False
    ranks: "Ranks | None" = None  # where torchrun started several processes
    given: tuple[str, ...] = ()  # the recipe and its changes, as words of a command

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints: the only one, or the first of several."""
        return self.ranks is None or self.ranks.first

    @property
    def together(self) -> "Ranks":
        """The processes of this training."""
        from pipeline.distributed import ALONE

        return self.ranks or ALONE

    @property
    def device(self) -> "torch.device":
        """The device; `auto` is an accelerator where there is one.

        Raises:
            UsageError: the device asked for is not there.
        """
        import torch

        from pipeline.distributed.launch import device_of_this_rank

        name = self.device_name
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = device_of_this_rank(torch.device(name))
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--device {name} cannot be used here: {reason}; try --device cpu") from error
        return device

    @property
    def placement(self) -> "Placement":
        """Where and how networks run."""
        import torch

        from pipeline.distributed.layouts import Layout
        from pipeline.distributed.placement import Placement

        settings = self.recipe.distributed
        return Placement(
            self.device,
            torch.bfloat16 if self.precision == "bf16" else None,
            self.together,
            Layout(settings.layout, settings.shard_size, settings.sync_batch_norm, settings.checkpoint_activations),
            settings.micro_batches,
        )

    @property
    def data_set(self) -> "DataSet":
        """The recipe's images."""
        from pipeline.data.dataset import DataSet

        return DataSet(self.recipe.data, self.data, self.run.decoded, self.console.note, self.seed)

    @property
    def assembly(self) -> "Assembly":
        """What a training of the recipe is put together from."""
        from pipeline.assembly import Assembly

        return Assembly(self.recipe, self.seed, self.data_set, self.placement, self.console)


@dataclass(frozen=True)
class Options:
    """The values of the common options; None: as the run knows it, else the default."""

    run: Path = DEFAULT_RUN
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    data: str | Location | None = None
    store: str | Location | None = None
    seed: int | None = None
    device: str = "auto"
    precision: str = "float32"
    dry_run: bool = False
    force: bool = False
    as_json: bool = False


def stage_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the common options to a command; it receives a `Context` first."""

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        options = Options(**{field.name: values.pop(field.name) for field in fields(Options)})
        return function(make_context(options), **values)

    for option in reversed(OPTIONS):
        command = option(command)
    return command


assume_option = click.option(
    "--assume-class-order", is_flag=True, help="A network that names no classes has the data set's, in their order."
)
OPTIONS = (
    click.option(
        "--run", type=click.Path(path_type=Path), default=DEFAULT_RUN, envvar="MPL_RUN",
        show_default=True, show_envvar=True, help="Run directory.",
    ),
    click.option("--recipe", help="Recipe: a name or a YAML file. [default: the run's own, else digits]"),
    click.option("--set", "changes", multiple=True, metavar="A.B=VALUE", help="Change one setting; repeatable."),
    click.option("--data", envvar="MPL_DATA", show_envvar=True, metavar="DIR|URL", help="Data folder."),
    click.option(
        "--store", envvar="MPL_STORE", show_envvar=True, metavar="DIR|URL",
        help="Where scores, selection and targets lie. [default: the run directory]",
    ),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed. [default: the run's own, else 0]"),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …"),
    click.option(
        "--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True,
        help="bf16: mixed precision.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what would be done and why; do nothing."),
    click.option("--force", is_flag=True, help="Make again what is there."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output."),
)  # fmt: skip


def make_context(options: Options, *, console: Console | None = None, parsed: Recipe | None = None) -> Context:
    """Resolve options against what the run already knows: its recipe, seed and data folder.

    `parsed` is a recipe that is resolved already, and takes precedence.
    """
    directory = Run(options.run)
    description = directory.description
    if parsed is not None:
        recipe = parsed
    elif options.recipe is None and description is not None:
        recipe = changed(description["recipe"], options.changes, str(directory / "run.json"))
    else:
        recipe = load_recipe(options.recipe or DEFAULT_RECIPE, options.changes)
    known = description or {}
    data = location(options.data) if options.data else None
    store = location(options.store) if options.store else None
    if data is not None:
        with storage_errors_as_usage("--data", data):
            if not data.is_dir():
                raise UsageError(f"--data {data} is not a directory")
            if parsed is None:
                recipe = of_the_folder(recipe, data, options, known)
    elif known.get("data") is not None:
        data = location(known["data"])
    if store is None and known.get("store") is not None:
        store = location(known["store"])
    return Context(
        run=directory,
        recipe=recipe,
        seed=known.get("seed", 0) if options.seed is None else options.seed,
        data=data.resolve() if data is not None else None,
        store=store.resolve() if store is not None else directory.root,
        device_name=options.device,
        precision=options.precision,
        console=console or Console(),
        force=options.force,
        dry_run=options.dry_run,
        as_json=options.as_json,
        given=as_given(options, recipe),
    )


def as_given(options: Options, recipe: Recipe) -> tuple[str, ...]:
    """The recipe and its changes as words of a command that makes the same again."""
    changes = [word for change in options.changes for word in ("--set", change)]
    return tuple(shlex.quote(word) for word in ("--recipe", options.recipe or recipe.name, *changes))


def of_the_folder(recipe: Recipe, data: Location, options: Options, known: dict[str, Any]) -> Recipe:
    """The recipe for the data set that the folder given holds, where it has a manifest.yaml of its own.

    Where nobody named a recipe or a data set, it is that one, at the size of its images. A data set that somebody
    named by `--set data.manifest` is taken as it is.

    Raises:
        UsageError: the recipe's data set is another one than the folder's; or the folder has no manifest, and the
            recipe's data set needs no folder.
    """
    if any(change.partition("=")[0].strip() == "data.manifest" for change in options.changes):
        return recipe
    own = own_manifest(data)
    new = options.recipe is None and "recipe" not in known
    if own is None:
        if new and str(options.data) != os.environ.get("MPL_DATA"):
            raise UsageError(
                f"--data {data} holds no manifest.yaml, and the default data set, {recipe.data.manifest}, needs no "
                "folder. Make one of your images with `mpl data import`, or name a data set: --recipe NAME or "
                "--set data.manifest=NAME"
            )
        return recipe
    size = min(own.image.size, LARGEST)
    if new:
        sized = any(change.partition("=")[0].strip() == "data.image_size" for change in options.changes)
        image_size = recipe.data.image_size if sized else size
        settings = recipe.data.model_copy(update={"manifest": own.name, "image_size": image_size})
        return recipe.model_copy(update={"name": own.name, "description": "", "differs": "", "data": settings})
    named = load_manifest(recipe.data.manifest, data)
    if named.name != own.name:
        origin = f"the recipe {options.recipe}" if options.recipe else f"the run {options.run}"
        raise UsageError(
            f"--data {data} holds the data set {own.name} (its manifest.yaml), and {origin} is for {named.name}. "
            f"To use the folder's: --set data.manifest={own.name} --set data.image_size={size}. "
            f"To use {named.name}: --data with its folder"
        )
    return recipe


@contextmanager
def storage_errors_as_usage(option: str, place: Location) -> Iterator[None]:
    """Errors of object storage at the first request: wrong credentials, no such bucket, no network."""
    try:
        with storage_errors():
            yield
    except OSError as error:
        raise UsageError(f"{option} {place} cannot be reached: {error}") from error


def changed(tree: dict[str, Any], changes: tuple[str, ...], origin: str) -> Recipe:
    """A kept recipe with `a.b=value` changes applied."""
    return parse_recipe(apply_changes(tree, changes), origin)


def with_changes(context: Context, **changes: Any) -> Context:
    """The context with settings of its recipe replaced, `filter__k=5` for filter.k; None leaves one alone."""
    texts = tuple(f"{key.replace('__', '.')}={value}" for key, value in changes.items() if value is not None)
    if not texts:
        return context
    try:
        recipe = changed(context.recipe.model_dump(mode="json"), texts, context.recipe.name)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    return replace(context, recipe=recipe)
