"""A run as one self-contained page: gathered from its files, rendered, written whole or not at all."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import DataError
from pipeline.pool.rejected import REASONS
from pipeline.report.page.charts import percent
from pipeline.report.page.dropped import Dropped, match_place, nats, why
from pipeline.report.page.filtering import POOL, ClassReport, FilterReport, Splits, gather_filter
from pipeline.report.page.kept import Kept
from pipeline.report.page.trainings import Judged, Training, evaluations, trainings
from pipeline.storage.files import Location, whole_file
from pipeline.storage.runs import Run, now

LONGEST = 160  # characters shown of a key or a detail
PIXELATED = 48  # pixels, side up to which images are shown enlarged without smoothing
MEANING = {
    "decode_error": "the bytes are no image that can be decoded",
    "empty": "there are no bytes",
    "too_large": "more pixels than it is safe to decode",
    "nonfinite": "the teacher's answer was not finite",
    "no_prediction": "the predictions have no answer for it",
    "eval_copy": "a copy of a validation or test image",
    "repeat_of": "the pixels of an earlier image of the pool",
    "below_probability": "less probable than the floor that was set",
    "below_k": "not among the best K of any class",
}


@dataclass(frozen=True)
class Tile:
    """A picture with a caption.

    Attributes:
        uris: of the picture, and of its match beside it; None where there is no picture.
        caption: below it.
        facts: (name, text), shown on demand.
        data: attributes for programs, by name.
    """

    uris: tuple[str | None, ...]
    caption: str
    facts: tuple[tuple[str, str], ...]
    data: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Tiles under a heading, and a sentence about them."""

    title: str
    tiles: tuple[Tile, ...]
    about: str = ""

    @property
    def has_pictures(self) -> bool:
        """Whether there is anything to see."""
        return any(uri for tile in self.tiles for uri in tile.uris)


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows of the run `name` on `data_set`.

    `stages` are rows with stage, state and detail; `filter` is None where not done.
    """

    name: str
    data_set: str
    description: dict[str, Any]
    made: str
    stages: Sequence[Mapping[str, Any]]
    filter: FilterReport | None
    trainings: Sequence[Training]
    evaluations: Sequence[Judged]
    notes: tuple[str, ...]


def gather(
    run: Run,
    outputs: Location,
    stages: Sequence[Mapping[str, Any]],
    splits: Splits,
    *,
    images: int | None = None,
    most_shards: int = 64,
) -> Report:
    """Gather what the page shows of a run; a part that is missing is left out with a note.

    Args:
        run: that exists.
        outputs: where selection.parquet, rejected/ and scores/ lie.
        stages: rows with stage, state and detail.
        splits: opens the pool and the evaluation splits, for pictures.
        images: examples of kept images for each class; None: 24, and fewer for more than 50 classes.
        most_shards: shards of the pool that are looked into at most.
    """
    description = run.description
    assert description is not None
    judged, notes = evaluations(run)
    filtered, record = None, run.record("filter")
    try:
        filtered = gather_filter(
            outputs,
            None if record is None else record["result"],
            splits,
            side=int(description["recipe"]["data"]["image_size"]),
            images=images,
            most_shards=most_shards,
        )
    except DataError as error:
        missing = record is None and not (outputs / "selection.parquet").exists()
        notes.append(
            "The pool has not been filtered yet (mpl filter)." if missing else f"The filter cannot be shown: {error}"
        )
    return Report(
        name=run.root.resolve().name,
        data_set=description["recipe"]["data"]["manifest"],
        description=description,
        made=now(),
        stages=stages,
        filter=filtered,
        trainings=trainings(run),
        evaluations=judged,
        notes=tuple(notes) + (filtered.notes if filtered else ()),
    )  # fmt: skip


def write_page(report: Report, path: Path) -> int:
    """Write the page; returns its bytes.

    Raises:
        RunError: the place cannot be written.
    """
    data = render(report).encode()
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def render(report: Report) -> str:
    """The page as HTML. All text is escaped, and a policy in the page forbids scripts and requests."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (percent, number, shown, when, nats):
        environment.filters[filter_.__name__] = filter_
    return environment.get_template("page.html").render(
        report=report,
        filter=report.filter,
        meaning=MEANING,
        pixelated=report.filter is not None and report.filter.side <= PIXELATED,
        rules=rules,
        kept_groups=kept_groups,
        below=below_tiles,
        left_out=left_out,
    )


def shown(text: object, longest: int = LONGEST) -> str:
    """Text from the web for people: control and direction characters made visible, and cut."""
    clean = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in str(text))
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def when(time: str) -> str:
    """A record's time, ISO 8601 in UTC, to the minute."""
    return f"{time[:10]} {time[11:16]} UTC"


def number(count: int) -> str:
    """With commas."""
    return f"{count:,}"


def rules(report: FilterReport) -> list[tuple[str, str]]:
    """The filter's rules in words."""
    texts = dict(report.rules)
    assign = {"any": "to any class", "argmax": "to its most probable class"}
    floor, copies = texts.pop("min_probability", "0.0"), texts.pop("copy_threshold", "None")
    kept = " (counted, and kept)" if texts.pop("keep_copies", "False") == "True" else ""
    texts.pop("copy_calibration", None)  # means nothing to people
    rows = [
        ("images per class, K", f"{int(texts.pop('k', 0)):,}"),
        ("an image goes", assign.get(rule := texts.pop("assign", "any"), rule)),
        ("least probability", "none" if float(floor) == 0 else floor),
        ("copies: similarity from", "not looked for" if copies == "None" else copies + kept),
        ("short classes", "filled by repeats" if texts.pop("upsample", "False") == "True" else "stay short"),
    ]
    rows += [(name.replace("_", " "), text) for name, text in texts.items()]
    rows.append(("shards of the pool", f"{report.shards:,}"))
    if repeated := report.record.get("repeated_keys"):
        rows.append(("images with an earlier key", f"{repeated:,}"))
    return rows


def kept_groups(report: FilterReport, of: ClassReport) -> list[Group]:
    """The kept images of a class from surest to least sure: in one group where all are shown, else in three."""
    tiles = tuple(_kept_tile(report, of, image) for image in of.kept.examples)
    ends = of.kept.ends
    if not ends:
        return [Group("kept, surest first", tiles)] if tiles else []
    return [
        Group("surest", tiles[:ends]),
        Group("in between", tiles[ends : len(tiles) - ends]),
        Group("least sure", tiles[len(tiles) - ends :]),
    ]


def below_tiles(report: FilterReport, of: ClassReport) -> tuple[Tile, ...]:
    """Those that just missed the class's line."""
    return tuple(_dropped_tile(report, example, of) for example in of.below)


def left_out(report: FilterReport) -> list[Group]:
    """Copies and repeats beside their matches, and a few of each other reason."""
    dropped = report.dropped
    tiles = {
        reason: tuple(_dropped_tile(report, example) for example in examples)
        for reason, examples in dropped.samples.items()
    }
    groups = []
    if copies := tiles.pop("eval_copy", ()):
        least = tuple(_dropped_tile(report, example) for example in dropped.least_alike)
        threshold = report.rules.get("copy_threshold")
        about = (
            f"{_of(report, 'eval_copy', least)} removed for a similarity of {threshold} or more: the pool's image, "
            "then the evaluation image. An image that was removed though it is no copy is most likely here."
        )
        groups.append(Group("Copies of evaluation images: the least alike", least, about))
        if report.rejected.get("eval_copy", 0) > len(least):
            groups.append(Group("Copies of evaluation images: a sample", copies, "Drawn evenly from all of them."))
    if repeats := tiles.pop("repeat_of", ()):
        about = f"{_of(report, 'repeat_of', repeats)}: the image, then the earlier one that is used instead."
        groups.append(Group("Repeats inside the pool", repeats, about))
    for reason in REASONS:
        if group := tiles.get(reason):
            groups.append(Group(reason, group, f"{_of(report, reason, group)}: {MEANING[reason]}."))
    return groups


def _of(report: FilterReport, reason: str, tiles: tuple[Tile, ...]) -> str:
    return f"{len(tiles):,} of {report.rejected.get(reason, len(tiles)):,}"


def _kept_tile(report: FilterReport, of: ClassReport, image: Kept) -> Tile:
    others = [report.classes[c].name for c in image.serves if report.classes[c] is not of]
    facts = [
        ("key", shown(image.key)),
        ("at", f"{shown(image.shard)}/{image.row}"),
        ("rank", f"{image.rank + 1:,} of {of.kept.rows:,}"),
        ("probability", percent(image.log_odds)),
        ("log-odds", nats(image.log_odds)),
    ]
    if image.repeat > 1:
        facts.append(("used", f"{image.repeat} times"))
    if others:
        facts.append(("serves also", ", ".join(map(shown, others))))
    data = {"kind": "kept", "class": of.name, "shard": image.shard, "row": image.row, "rank": image.rank}
    uri = report.pictures.uris.get((POOL, image.shard, image.row))
    return Tile((uri,), percent(image.log_odds), tuple(facts), data | {"log-odds": repr(image.log_odds)})


def _dropped_tile(report: FilterReport, example: Dropped, of: ClassReport | None = None) -> Tile:
    uris = [report.pictures.uris.get((POOL, example.shard, example.row))]
    facts = [("key", shown(example.key)), ("at", f"{shown(example.shard)}/{example.row}")]
    data = {"kind": example.reason, "shard": example.shard, "row": example.row}
    reason = [("reason", example.reason), ("why", shown(why(example, [c.name for c in report.classes])))]
    if of is not None and example.log_odds is not None and example.needed is not None:
        caption = percent(example.log_odds)
        facts += [("probability", f"{caption}, needs {percent(example.needed)}"), *reason]
        data |= {"class": of.name, "log-odds": repr(example.log_odds)}
    elif place := match_place(example):
        uris.append(report.pictures.uris.get(place))
        mirrored = " mirrored" if example.mirrored else ""
        caption = f"{example.similarity:.3f}{mirrored}" if place[0] != POOL and example.similarity is not None else ""
        facts += [("similarity", f"{example.similarity:.4f}{mirrored}")] if example.similarity is not None else []
        facts.append(("matches", shown(example.match)))
    else:
        caption = example.detail or example.reason
        facts += reason
    return Tile(tuple(uris), shown(caption, 60), tuple(facts), data)
