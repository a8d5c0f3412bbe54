"""What columns mean, and what is refused with the row that is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.answers.forms import Names, answers_of, recognise
from pipeline.answers.reading import find_predictions
from pipeline.errors import DataError

OURS = Names(("cat", "dog", "owl"), False)
STATED = Names(("cat", "dog", "owl"), True)
P = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]


def answer(names: Names = OURS, form: Any = None, **columns: Any) -> tuple[str, np.ndarray, dict[str, int]]:
    """Form, distributions, unknown names."""
    batch = pa.record_batch({"key": pa.array(["a", "b"]), **{k: pa.array(v) for k, v in columns.items()}})
    found = recognise(batch.schema, names, form, "file")
    answers = answers_of(batch, found, 0, "file")
    return found.form, np.where(answers.given[:, None], answers.p, np.nan), answers.unknown


@pytest.mark.parametrize(
    ("form", "names", "columns", "expected"),
    [
        ("probabilities", STATED, {"probabilities": P}, P),
        (
            "probabilities",
            OURS,
            {"dog": [0.25, 1.0], "cat": [0.5, 0.0], "owl": [0.25, 0.0]},
            [[0.25, 0.5, 0.25], [1, 0, 0]],
        ),
        ("logits", STATED, {"logits": np.log(np.maximum(P, 1e-30)).tolist()}, P),
        ("labels", OURS, {"label": ["owl", "cat"]}, [[0, 0, 1], [1, 0, 0]]),
        ("labels", OURS, {"label": [2, 0]}, [[0, 0, 1], [1, 0, 0]]),
        ("labels", OURS, {"prediction": [2.0, 0.0]}, [[0, 0, 1], [1, 0, 0]]),
        ("votes", OURS, {"votes": [["cat", "dog"], ["dog", "dog", "owl", "dog"]]}, [[0.5, 0.5, 0], [0, 0.75, 0.25]]),
        ("votes", OURS, {"rater_1": ["cat", "dog"], "rater_2": ["owl", None]}, [[0.5, 0, 0.5], [0, 1, 0]]),
        (
            "top-k",
            OURS,
            {"classes": [["cat"], ["dog", "owl"]], "scores": [[0.6], [0.7, 0.3]]},
            [[0.6, 0.2, 0.2], [0, 0.7, 0.3]],
        ),
        (
            "top-k",
            OURS,
            {"top": [[{"label": "cat", "score": 0.8}], [{"label": "owl", "score": 1.0}]]},
            [[0.8, 0.1, 0.1], [0, 0, 1]],
        ),
        ("probabilities", STATED, {"probabilities": [P[0], None]}, [P[0], [np.nan] * 3]),
        ("probabilities", STATED, {"probabilities": [[0, 0, 1], [1, 0, 0]]}, [[0, 0, 1], [1, 0, 0]]),
        ("logits", STATED, {"logits": [[0, 0, 90], [90, 0, 0]]}, [[0, 0, 1], [1, 0, 0]]),
        (
            "probabilities",
            OURS,
            {"prediction": ["cat", "dog"], "p:dog": [0.25, 1.0], "p:cat": [0.5, 0.0], "p:owl": [0.25, 0.0]},
            [[0.25, 0.5, 0.25], [1, 0, 0]],
        ),
        ("probabilities", STATED, {"cat": [0.5, 0.0], "dog": [0.25, 1.0], "owl": [0.25, 0.0], "n": [1, 2]}, P),
    ],
    ids=[
        "list",
        "per class",
        "logits",
        "names",
        "numbers",
        "reals",
        "votes",
        "annotators",
        "top-k",
        "pairs",
        "none",
        "one-hot",
        "whole logits",
        "mpl predict",
        "classes stated",
    ],
)
def test_forms_are_recognised(form: str, names: Names, columns: dict, expected: list) -> None:
    found, p, unknown = answer(names, **columns)
    assert found == form
    np.testing.assert_allclose(p, expected, atol=1e-6)
    assert not unknown


def test_a_name_of_no_class_is_no_answer_and_counted() -> None:
    _, p, unknown = answer(label=["Cat", "dog"])  # two spellings are two names
    assert np.isnan(p[0]).all()
    assert unknown == {"Cat": 1}


@pytest.mark.parametrize(
    ("names", "form", "columns", "words"),
    [
        (
            STATED,
            None,
            {"probabilities": [[50, 25, 25.0], [1, 0, 0]]},
            "row 0 is no distribution: it sums to 100: these are percentages",
        ),
        (
            STATED,
            None,
            {"probabilities": [P[0], [0.2, 0.2, 0.2]]},
            r"row 1 is no distribution: it sums to 0.6\. If these are logits",
        ),
        (STATED, None, {"probabilities": [P[0], [-0.5, 1.0, 0.5]]}, "row 1 is no distribution: it holds -0.5"),
        (
            STATED,
            None,
            {"probabilities": [P[0], [np.nan, 1.0, 0.5]]},
            "row 1 is no distribution: it holds a number that is not finite",
        ),
        (
            STATED,
            None,
            {"probabilities": [P[0], [0.5, 0.5]]},
            "row 1 has 2 numbers in 'probabilities', and there are 3 class names",
        ),
        (OURS, None, {"probabilities": P}, "does not say which classes the numbers in 'probabilities' are"),
        (OURS, None, {"other": [True, False]}, "no column can be read as an answer"),
        (OURS, "votes", {"probabilities": P}, "no column can be read as votes"),
        (
            OURS,
            None,
            {"label": ["cat", "dog"], "votes": [["cat"], ["dog"]]},
            "can be read as votes in 'votes' or as labels in 'label'; say which: --as votes",
        ),
        (
            OURS,
            None,
            {"classes": [["cat"], ["dog"]], "scores": [[0.9], [1.7]]},
            "row 1 is no distribution: it sums to 1.7",
        ),
        (
            OURS,
            None,
            {"classes": [["cat"], ["dog", "owl"]], "scores": [[0.9], [0.7]]},
            "row 1 has 2 classes in 'classes' and 1 numbers",
        ),
        (STATED, None, {"outputs": [[0, 0, 1], [1, 0, 0]]}, "can be read as probabilities in 'outputs' or as votes"),
        (STATED, None, {"box": [[2, 0, 1]] * 2, "probabilities": P}, "as top-k in 'box', 'probabilities'"),
        (
            OURS,
            None,
            {"label": ["cat", "dog"], "prediction": ["owl", "dog"]},
            "in 'label' or as labels in 'prediction'",
        ),
        (OURS, None, {"pred": ["cat", "dog"], "width": [8, 8], "height": [8, 8]}, "no column can be read as an answer"),
        (OURS, None, {"sign 1": [0, 1], "sign 2": [1, 0]}, "no column can be read as an answer"),
        (
            OURS,
            "logits",
            {"index": [5, 6], "cat": [0.5, 0.0], "dog": [0.2, 1.0], "owl": [0.3, 0.0]},
            "index hold numbers and name no class of the data set",
        ),
        (Names(("1.0", "2.0"), True), None, {"label": [1.0, 2.0]}, "the labels are decimal numbers, and so are names"),
    ],
)
def test_what_is_refused(names: Names, form: str | None, columns: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        answer(names, form, **columns)


def test_no_keys() -> None:
    with pytest.raises(DataError, match="has no column of keys; it has label"):
        recognise(pa.schema([("label", pa.string())]), OURS, None, "file")


def read(path: Path) -> list[dict]:
    (file,) = find_predictions(str(path))
    return [row for _, part in file.parts() for row in part.to_pylist()]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    keys, labels = ["x/0012.png", "0013"], ["cat", "owl"]
    pq.write_table(pa.table({"key": keys, "label": labels}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("key;label\nx/0012.png;cat\n0013;owl\n")
    (tmp_path / "a.tsv").write_bytes("key\tlabel\nx/0012.png\tcat\n0013\towl\n".encode("utf-16"))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"key": k, "label": v}) + "\n" for k, v in zip(keys, labels, strict=True))
    )
    np.savez(tmp_path / "a.npz", key=np.array(keys), label=np.array(labels))
    folder = tmp_path / "dataset"
    folder.mkdir()
    table = pa.table({"key": keys, "label": labels})
    with pa.OSFile(str(folder / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    for path in (*tmp_path.glob("a.*"), folder):
        assert read(path) == [{"key": "x/0012.png", "label": "cat"}, {"key": "0013", "label": "owl"}], path


def test_class_names_that_a_file_states(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "probabilities": [[0.5, 0.5]]}).replace_schema_metadata(
        {"class_names": '["x", "y"]'}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    np.savez(
        tmp_path / "b.npz", key=np.array(["a"]), probabilities=np.full((1, 2), 0.5), class_names=np.array(["x", "y"])
    )
    for name in ("a.parquet", "b.npz"):
        assert find_predictions(str(tmp_path / name))[0].class_names == ("x", "y")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", key=np.array(["a", None], dtype=object))
    with pytest.raises(DataError, match="holds Python objects, which only unpickling could read"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.npz"])
def test_damage_is_a_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"key": ["a"] * 50, "label": ["cat"] * 50}), path)
    elif name == "a.npz":
        np.savez(path, key=np.array(["a"] * 50), label=np.array(["cat"] * 50))
    else:
        path.write_text("key,label\n" + "a,cat\n" * 50 if name == "a.csv" else '{"key": "a", "label": "cat"}\n' * 50)
    whole, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        place, kind = int(draw.integers(len(whole))), int(draw.integers(3))
        damaged = whole[:place] + (b"" if kind == 0 else draw.bytes(4) + whole[place + 4 :])
        path.write_bytes(damaged if kind < 2 else whole[:place] + b"9" * 5000 + whole[place:])
        try:
            for part in find_predictions(str(path))[0].parts():
                answers_of(part[1], recognise(part[1].schema, OURS, "labels", "f"), 0, "f")
        except DataError:
            refused += 1
    assert refused
