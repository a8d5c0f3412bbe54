"""What the columns of a file of predictions mean, and the distributions that they come to.

Five forms. `probabilities`, `logits`: a column for each class, or one list column. `labels`: one class to an image, by
name or number. `top-k`: a few classes with their probabilities; the rest of the mass is spread evenly over the others.
`votes`: what several annotators said; their shares.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.classes import SHOWN, ClassNames, canonical
from pipeline.errors import DataError

Form = Literal["probabilities", "logits", "labels", "top-k", "votes"]
FORMS: tuple[Form, ...] = get_args(Form)
KEYS = ("key", "__key__", "file_name", "filename", "path", "file", "image_path", "image_file", "image")
LABELS = ("label", "prediction", "predicted", "class", "class_name", "category", "answer")
VOTES = ("votes", "annotations", "labels", "answers")
EMBEDDING = "embedding"
NUMBERS = ("prob", "logit", "softmax", "distribution")  # in the name of a list of whole numbers: not classes
CLASSES = ("label", "class", "categor", "vote", "annotation", "answer", "prediction")  # and these: classes
ANNOTATOR = re.compile(
    r"(annotator|annotation|rater|labell?er|worker|voter?|judge|coder|reviewer|person|expert)[ _-]?\w*"
)
DECIMAL = re.compile(r"[+-]?\d*\.\d*")  # a name that a program may have made a number of
OURS = "p:"  # before a class's name, in what `mpl predict` writes: no class can have the name of another column
TOLERANCE = 0.02  # of a sum of probabilities: what rounding to two decimals or to float16 leaves
OTHER = ("split", EMBEDDING)  # columns that are no answer


@dataclass(frozen=True)
class Names:
    """The classes of the answers, in order.

    Attributes:
        names: C_T of them.
        stated: whether the file, or a person, said what they are; else they are the data set's.
    """

    names: tuple[str, ...]
    stated: bool


@dataclass(frozen=True)
class Columns:
    """Which columns mean what.

    Attributes:
        form: of the answers.
        key: column of the images' keys, or None.
        place: columns of shard and row, or None.
        split: column of the split that an image is in, or None.
        answer: columns of the answer: one for each class, a list, labels, or (labels, their probabilities).
        names: of the classes.
        embedding: column of embeddings, or None.
        numbers: of an embedding, E; 0: there is none.
    """

    form: Form
    key: str | None
    place: tuple[str, str] | None
    split: str | None
    answer: tuple[str, ...]
    names: tuple[str, ...]
    embedding: str | None = None
    numbers: int = 0

    def with_numbers(self, part: pa.RecordBatch) -> "Columns":
        """The same, with the length of the first embedding in a part of the file."""
        if self.embedding is None:
            return self
        lengths = pc.drop_null(pc.list_value_length(part.column(self.embedding)))
        return replace(self, numbers=lengths[0].as_py() if len(lengths) else 0)


@dataclass(frozen=True, eq=False)
class Answers:
    """Some rows of a file.

    Attributes:
        keys: of n images, or None.
        shards, rows: identity of each, or None.
        splits: name of the split that each is in, or None.
        p: distributions, (n, C_T), float32, rows sum to 1 where `given`.
        embeddings: (n, E), float32, zero where there is no answer.
        given: whether there is an answer, (n,).
        unknown: names of no class that were answered, with how often.
    """

    keys: pa.Array | None
    shards: pa.Array | None
    rows: NDArray[np.int64] | None
    splits: pa.Array | None
    p: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    given: NDArray[np.bool_]
    unknown: dict[str, int]


def recognise(schema: pa.Schema, names: Names, form: Form | None, where: str, *, in_order: bool = False) -> Columns:
    """Which columns of a file mean what.

    Args:
        schema: of the file.
        names: classes that the file or a person states, or else the data set's.
        form: as a person says; None: to be found out.
        where: the file, for messages.
        in_order: numbers that nobody names stand in the data set's order.

    Raises:
        DataError: no column has keys; no column, or more than one, could be the answer; or nobody says which classes
            its numbers are.
    """
    lower = {name.strip().lower(): name for name in schema.names}
    place = (lower["shard"], lower["row"]) if {"shard", "row"} <= lower.keys() else None
    key = next((lower[name] for name in KEYS if name in lower), None)
    if key is None and place is None:
        raise DataError(
            f"{where} has no column of keys; it has {_some(schema.names)}. Give each row the image's path or tar key "
            "in a column `key`, or its `shard` and `row`"
        )
    taken = {key, *(place or ()), *(lower[name] for name in (*OTHER, *KEYS) if name in lower)}
    left = [field for field in schema if field.name not in taken]
    options = _options(left, names, form, where)
    if not options:
        wanted = f"as {form}" if form else "as an answer"
        raise DataError(
            f"{where}: no column can be read {wanted}; it has {_some(schema.names)}. A column for each class "
            f"({_some(names.names)}), one list of probabilities or logits, `label`, `votes`, or `labels` with `scores`"
        )
    if len(options) > 1:
        ways = " or as ".join(f"{kind} in {', '.join(map(repr, columns[:SHOWN]))}" for kind, columns in options)
        kinds = list(dict.fromkeys(kind for kind, _ in options))
        more = f"say which: --as {kinds[0]}" if len(kinds) > 1 else "leave one of them in the file"
        raise DataError(f"{where} can be read as {ways}; {more}")
    kind, columns = options[0]
    stated = names
    if kind in ("probabilities", "logits"):
        if len(columns) > 1:
            own = all(name.startswith(OURS) for name in columns)
            stated = Names(tuple(name.removeprefix(OURS) for name in columns) if own else columns, True)
        elif not names.stated and not in_order:
            raise DataError(
                f"{where} does not say which classes the numbers in {columns[0]!r} are: in a wrong order every answer "
                "would be wrong. Write them into its metadata as class_names (JSON), or give --classes FILE; or, if "
                f"they are the data set's, in its order ({_some(names.names)}): --assume-class-order"
            )
    embedding = lower.get(EMBEDDING)
    if embedding is not None and not _is_list(schema.field(embedding).type):
        raise DataError(
            f"{where}: {embedding!r} holds {schema.field(embedding).type}; an embedding is a list of numbers"
        )
    return Columns(kind, key, place, lower.get("split"), columns, stated.names, embedding)


Option = tuple[Form, tuple[str, ...]]
"""A way to read a file: a form, and the columns of its answers."""


def _options(fields: Sequence[pa.Field], names: Names, form: Form | None, where: str) -> list[Option]:
    """All ways to read these columns, or those that a person's word leaves."""
    lists = {field.name: field.type.value_type for field in fields if _is_list(field.type)}
    singles = {field.name: field.type for field in fields if not _is_list(field.type)}
    found = _of_lists(lists)
    found += _of_singles(singles, names, form, where, alone=not found)
    if form is None:
        return found
    kept = [columns for kind, columns in found if kind == form or _same_columns(kind, form)]
    said = kept or [columns for columns in _as_said(lists, singles, form) if columns]
    return [(form, columns) for columns in dict.fromkeys(said)]


def _same_columns(found: Form, wanted: Form) -> bool:
    """Whether a form that was recognised has the columns of another one that a person names."""
    return {found, wanted} == {"probabilities", "logits"} or (found == "labels" and wanted == "votes")


def _of_lists(lists: dict[str, pa.DataType]) -> list[Option]:
    """Ways to read the lists: whole numbers are probabilities or classes as the column's name says, else either."""
    numbers = [name for name, kind in lists.items() if pa.types.is_floating(kind) or _is_whole(kind, name, NUMBERS)]
    classes = [
        name
        for name, kind in lists.items()
        if _is_text(kind) or (name not in numbers and _is_whole(kind, name, CLASSES))
    ]
    known = {*numbers, *classes}
    unclear = [name for name, kind in lists.items() if pa.types.is_integer(kind) and name not in known]
    found: list[Option] = [("top-k", (name,)) for name, kind in lists.items() if pa.types.is_struct(kind)]
    if len(numbers) > 1 and len(named := [name for name in numbers if "prob" in name.lower()]) == 1:
        numbers = named
    if classes and numbers:
        return found + [("top-k", (one, beside)) for one in classes for beside in numbers]
    found += [("logits" if "logit" in name.lower() else "probabilities", (name,)) for name in numbers]
    found += [("votes", (name,)) for name in classes]
    for name in unclear:
        found += [("top-k", (name, beside)) for beside in numbers]
        if not numbers:
            found += [("probabilities", (name,)), ("votes", (name,))]
    return found


def _of_singles(
    singles: dict[str, pa.DataType], names: Names, form: Form | None, where: str, *, alone: bool
) -> list[Option]:
    """Ways to read columns of one value each; `alone`: there is no list beside them.

    Raises:
        DataError: beside the columns of the classes there are numbers that may be classes of the teacher's, or not.
    """
    scalar = {name: kind for name, kind in singles.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)}
    if len(prefixed := [name for name in scalar if name.startswith(OURS)]) > 1:  # of `mpl predict`
        return [("probabilities", tuple(prefixed))]
    known = {canonical(name) for name in names.names}
    per_class = [name for name in scalar if canonical(name) in known]
    labels = [name for name in singles if name.strip().lower() in LABELS]
    if len(per_class) >= 2 and len(per_class) >= len(known) - 1:
        others = [name for name in scalar if name not in per_class and name not in labels]
        kinds = {pa.types.is_floating(scalar[name]) for name in (*per_class, *others)}
        if others and not names.stated and (form == "logits" or len(kinds) > 1):
            raise DataError(
                f"{where}: {_some(others)} hold numbers and name no class of the data set: are they classes of the "
                "teacher's? Leave them out, or list the columns that are classes in a file, --classes FILE"
            )
        return [("probabilities", tuple(per_class if names.stated else [n for n in scalar if n not in labels]))]
    if labels:
        return [("labels", (name,)) for name in labels]
    if not alone:
        return []
    people = [name for name, kind in singles.items() if ANNOTATOR.fullmatch(name.strip().lower()) and name not in known]
    if len(people) > 1:
        return [("votes", tuple(people))]
    if len(scalar) > 1 and all(pa.types.is_floating(kind) for kind in scalar.values()):
        return [("probabilities", tuple(scalar))]  # classes of the teacher's own
    return []


def _as_said(lists: dict[str, pa.DataType], singles: dict[str, pa.DataType], form: Form) -> list[tuple[str, ...]]:
    """Columns that are answers only because a person says so."""
    if form in ("probabilities", "logits"):
        whole = [name for name, kind in lists.items() if pa.types.is_integer(kind)]
        columns = [name for name, kind in singles.items() if pa.types.is_integer(kind)]
        return [(name,) for name in whole] if whole else [tuple(columns) if len(columns) > 1 else ()]
    if form == "votes":
        return [tuple(name for name, kind in singles.items() if _is_text(kind) or pa.types.is_integer(kind))]
    return []


def _is_whole(kind: pa.DataType, name: str, words: Sequence[str]) -> bool:
    """Whether these are whole numbers in a column whose name has one of the words."""
    return pa.types.is_integer(kind) and any(word in name.lower() for word in words)


def answers_of(part: pa.RecordBatch, columns: Columns, first: int, where: str) -> Answers:
    """The answers in a part of a file.

    Args:
        part: n rows.
        columns: from `recognise`.
        first: number of the first row, for messages.
        where: the file, for messages.

    Raises:
        DataError: a row is no distribution (its number and sum), or a column changed its type within the file.
    """
    try:
        return _answers_of(part, columns, first, where)
    except DataError:
        raise
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}, after row {first:,}: a column cannot be read as {columns.form}: {error}") from error


def _answers_of(part: pa.RecordBatch, columns: Columns, first: int, where: str) -> Answers:
    n, classes = part.num_rows, len(columns.names)
    keys = None if columns.key is None else _keys(part.column(columns.key))
    shards = rows = None
    if columns.place is not None:
        shards = part.column(columns.place[0]).cast(pa.string())
        rows = np.asarray(pc.fill_null(part.column(columns.place[1]), -1)).astype(np.int64)
    unknown: dict[str, int] = {}
    if columns.form in ("probabilities", "logits"):
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is not finite, and told below
            values, given = _numbers(part, columns, first, where)
        p = _softmax(values, given) if columns.form == "logits" else _normal(values, given, first, where)
    elif columns.form == "top-k":
        p, given = _top_k(part, columns, first, where, unknown)
    else:
        p, given = _shares(part, columns, where, unknown)
    assert p.shape == (n, classes)
    splits = None if columns.split is None else part.column(columns.split).cast(pa.string())
    return Answers(keys, shards, rows, splits, p, _embeddings(part, columns, given, first, where), given, unknown)


def _keys(column: pa.Array) -> pa.Array:
    if pa.types.is_struct(column.type):  # an image of Hugging Face's
        column = pc.struct_field(column, "path")
    text = column.cast(pa.large_string())
    return pc.replace_substring_regex(text, r"^\./", "")


def _numbers(
    part: pa.RecordBatch, columns: Columns, first: int, where: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(n, C_T) as the file has them, and which rows are there."""
    classes = len(columns.names)
    if len(columns.answer) > 1:
        arrays = [part.column(name) for name in columns.answer]
        given = ~np.all([np.asarray(array.is_null()) for array in arrays], axis=0)
        try:
            values = np.stack([array.to_numpy(zero_copy_only=False).astype(np.float32) for array in arrays], axis=1)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{where}, after row {first:,}: a column of a class holds what is no number: {error}"
            ) from error
        return values, given
    column = part.column(columns.answer[0])
    given = np.asarray(column.is_valid())
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), classes))
    wrong = np.flatnonzero(lengths != classes)
    if len(wrong):
        raise DataError(
            f"{where}: row {first + int(wrong[0]):,} has {lengths[wrong[0]]:,} numbers in {columns.answer[0]!r}, and "
            f"there are {classes:,} class names"
        )
    flat = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if given.all():
        return flat.reshape(-1, classes), given
    values = np.zeros((len(given), classes), np.float32)
    values[given] = flat.reshape(-1, classes)
    return values, given


def _embeddings(
    part: pa.RecordBatch, columns: Columns, given: NDArray[np.bool_], first: int, where: str
) -> NDArray[np.float32]:
    result = np.zeros((part.num_rows, columns.numbers), np.float32)
    if columns.embedding is None or not columns.numbers:
        return result
    column = part.column(columns.embedding)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    if len(wrong := np.flatnonzero(given & (lengths != columns.numbers))):
        row = int(wrong[0])
        raise DataError(
            f"{where}: row {first + row:,} has an embedding of {lengths[row]:,} numbers, others have "
            f"{columns.numbers:,}"
        )
    flat = pc.list_flatten(column.filter(pa.array(given))).to_numpy(zero_copy_only=False)
    result[given] = flat.astype(np.float32).reshape(-1, columns.numbers)
    if len(wrong := np.flatnonzero(~np.isfinite(result).all(axis=1))):
        raise DataError(f"{where}: row {first + int(wrong[0]):,} has an embedding with a number that is not finite")
    return result


def _normal(values: NDArray[np.float32], given: NDArray[np.bool_], first: int, where: str) -> NDArray[np.float32]:
    """Probabilities whose rows sum to 1 nearly, made to sum to 1."""
    sums = values.sum(axis=1, dtype=np.float64)
    low = values.min(axis=1) if values.size else sums
    bad = np.flatnonzero(given & (~(np.abs(sums - 1) <= TOLERANCE) | (low < 0)))
    if len(bad):
        row = int(bad[0])
        raise DataError(f"{where}: row {first + row:,} is no distribution: {_why(float(sums[row]), float(low[row]))}")
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float32] = values / sums[:, None].astype(np.float32)
    if not given.all():
        result[~given] = 0.0
    return result


def _why(total: float, low: float) -> str:
    if not np.isfinite(total):
        return "it holds a number that is not finite"
    if low < 0:
        return f"it holds {low:.4g}, and probabilities are not negative. If these are logits: --as logits"
    if abs(total - 100) <= 100 * TOLERANCE:
        return f"it sums to {total:.4g}: these are percentages; divide them by 100"
    return f"it sums to {total:.4g}. If these are logits: --as logits"


def _softmax(values: NDArray[np.float32], given: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Of logits; a row that is not finite is no answer."""
    top = values.max(axis=1, keepdims=True) if values.size else values
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.exp(values - top)
        p /= p.sum(axis=1, keepdims=True)
    finite = np.isfinite(p).all(axis=1) & np.isfinite(values).all(axis=1)
    given &= finite
    p[~given] = 0.0
    return p


def _shares(
    part: pa.RecordBatch, columns: Columns, where: str, unknown: dict[str, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of labels, or votes: counts of each class divided by all that name one."""
    counts = np.zeros((part.num_rows, len(columns.names)), np.float32)
    for name in columns.answer:
        column = part.column(name)
        if _is_list(column.type):
            owner = np.repeat(np.arange(part.num_rows), np.asarray(pc.fill_null(pc.list_value_length(column), 0)))
            column = pc.list_flatten(column)
        else:
            owner = np.arange(part.num_rows)
        labels = _labels(column, columns.names, where, unknown)
        np.add.at(counts, (owner[labels >= 0], labels[labels >= 0]), 1)
    totals = counts.sum(axis=1, keepdims=True)
    given = np.asarray(totals[:, 0] > 0)
    counts[given] /= totals[given]
    return counts, np.atleast_1d(given)


def _top_k(
    part: pa.RecordBatch, columns: Columns, first: int, where: str, unknown: dict[str, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    classes = len(columns.names)
    column = part.column(columns.answer[0])
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    names = pc.list_flatten(column)
    if len(columns.answer) == 1:  # a list of structs
        fields = {field.name.lower(): field.name for field in names.type}
        label = next((fields[name] for name in ("label", "class", "name", "class_name") if name in fields), None)
        score = next((fields[name] for name in ("score", "probability", "prob", "p") if name in fields), None)
        if label is None or score is None:
            raise DataError(f"{where}: {columns.answer[0]!r} must hold objects of `label` and `score`")
        scores, names = pc.struct_field(names, score), pc.struct_field(names, label)
    else:
        beside = part.column(columns.answer[1])
        other = np.asarray(pc.fill_null(pc.list_value_length(beside), 0))
        if len(wrong := np.flatnonzero(other != lengths)):
            row = int(wrong[0])
            raise DataError(
                f"{where}: row {first + row:,} has {lengths[row]} classes in {columns.answer[0]!r} and {other[row]} "
                f"numbers in {columns.answer[1]!r}"
            )
        scores = pc.list_flatten(beside)
    owner, labels = np.repeat(np.arange(part.num_rows), lengths), _labels(names, columns.names, where, unknown)
    values = scores.to_numpy(zero_copy_only=False).astype(np.float64)
    totals = np.bincount(owner, values, part.num_rows)
    low = np.ones(part.num_rows)
    np.minimum.at(low, owner, values)
    if len(bad := np.flatnonzero(~(totals <= 1 + TOLERANCE) | (low < 0))):
        row = int(bad[0])
        raise DataError(f"{where}: row {first + row:,} is no distribution: {_why(float(totals[row]), float(low[row]))}")
    p = np.zeros((part.num_rows, classes))
    known = labels >= 0
    np.add.at(p, (owner[known], labels[known]), values[known])
    named = np.zeros((part.num_rows, classes), bool)
    named[owner[known], labels[known]] = True
    free = classes - named.sum(axis=1)
    rest = np.clip(1 - p.sum(axis=1), 0, None)
    p += np.where(named, 0.0, (rest / np.maximum(free, 1))[:, None])
    given: NDArray[np.bool_] = np.asarray(named.any(axis=1))
    sums = p.sum(axis=1)
    p[given] /= sums[given, None]
    p[~given] = 0.0
    return p.astype(np.float32), given


def _labels(column: pa.Array, names: Sequence[str], where: str, unknown: dict[str, int]) -> NDArray[np.int64]:
    """The class of each value, (n,), from 0; −1 where it is null, empty or the name of no class."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    known = ClassNames(tuple(names), where)
    if pa.types.is_floating(column.type):
        column = pc.cast(column, pa.int64())  # raises for 0.5
        if decimal := [name for name in names if DECIMAL.fullmatch(name.strip())]:
            raise DataError(
                f"{where}: the labels are decimal numbers, and so are names of classes ({_some(decimal)}): write the "
                "labels as text"
            )
    if pa.types.is_integer(column.type):
        known.require_one_reading(where)
    encoded = column.cast(pa.string()).dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    labels = [known.label(text) if text.strip() else None for text in texts]
    labels = [None if label is None or not 0 <= label < len(names) else label for label in labels]
    table = np.array([*(-1 if label is None else label for label in labels), -1], np.int64)
    codes = np.asarray(pc.fill_null(encoded.indices, len(texts))).astype(np.int64)
    counts = np.bincount(codes, minlength=len(texts) + 1)
    for place, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if label is None and text.strip():
            unknown[text] = unknown.get(text, 0) + int(counts[place])
    return table[codes]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _some(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
