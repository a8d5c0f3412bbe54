"""`mpl report` on real runs: what the page shows, against the run's files read another way."""

import base64
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from pipeline.data.readers.digits import digits_shards
from pipeline.storage.files import fingerprint, write_sealed

IMAGES, BELOW = 9, 3


@dataclass
class Page(HTMLParser):
    """A page taken apart: tags with attributes, texts, tiles with their pictures, table rows."""

    text: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tiles: list[dict] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    in_row: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "figure" and "data-kind" in found:
            self.tiles.append({**found, "pictures": []})
        if tag == "img":
            self.tiles[-1]["pictures"].append(found["src"])
        if tag == "tr":
            self.rows.append([])
            self.in_row = True

    def handle_endtag(self, tag: str) -> None:
        self.in_row = self.in_row and tag != "tr"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.in_row and data.strip():
            self.rows[-1].append(data.strip())

    def of(self, *kinds: str) -> list[dict]:
        """The tiles of some kinds."""
        return [tile for tile in self.tiles if tile["data-kind"] in kinds]


def report(mpl, run: Path, *arguments: object) -> Page:
    outcome = mpl("report", "--run", run, *arguments)
    assert outcome.status == 0, outcome.err
    return Page((run / "report.html").read_text(encoding="utf-8"))


def class_row(page: Page, name: str) -> list[str]:
    """The row of a class in the table of classes: name, available, kept, short, surest, least sure, line, log-odds."""
    (found,) = (row for row in page.rows if row[0] == name and len(row) == 8)
    return found


def rejects(run: Path) -> list[dict]:
    return [row for path in sorted((run / "rejected").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def pixels_in(shard, row: int) -> np.ndarray:
    (sample,) = shard.read(row, row + 1)
    return np.asarray(Image.open(io.BytesIO(sample.data)).convert("RGB"))


def test_the_page_shows_what_the_files_hold(mpl, run) -> None:
    page = report(mpl, run, "--images", IMAGES)
    selection, lost = pq.read_table(run / "selection.parquet").to_pylist(), rejects(run)
    record = json.loads((run / "filter/record.json").read_text())["result"]
    shown = {tag["data-reason"] for name, tag in page.tags if name == "tr" and "data-reason" in tag}
    assert shown == {"kept", *record["rejected"]}
    table = {row[0]: row[1] for row in page.rows if len(row) > 1}
    assert table["kept"] == str(record["kept"])
    assert table["images in"] == f"{record['images']:,}"
    for reason, count in record["rejected"].items():
        assert table[reason] == f"{count:,}" == f"{sum(row['reason'] == reason for row in lost):,}"
    for c, told in enumerate(record["classes"]):
        mine = [row for row in selection if row["class"] == c]
        line = class_row(page, told["name"])
        assert line[1:4] == [f"{told['available']:,}", str(len(mine)), str(told["short"])]
        assert float(line[-1].replace("−", "-")) == pytest.approx(told["threshold"], abs=5e-5)
        tiles = [tile for tile in page.of("kept") if tile["data-class"] == told["name"]]
        ranks = [int(tile["data-rank"]) for tile in tiles]
        assert len(ranks) == IMAGES
        assert ranks[:3] + ranks[-3:] == [0, 1, 2, 27, 28, 29]
        odds = [float(tile["data-log-odds"]) for tile in tiles]
        assert odds == sorted(odds, reverse=True)
        places = {row["rank"]: (row["shard"], row["row"], row["log_odds"]) for row in mine}
        found = [(t["data-shard"], int(t["data-row"]), float(t["data-log-odds"])) for t in tiles]
        assert found == [places[rank] for rank in ranks]


def test_those_below_the_line_are_rejected_and_the_nearest(mpl, run) -> None:
    page = report(mpl, run, "--images", IMAGES)
    lost = rejects(run)
    seen = 0
    for c in range(10):
        near = sorted((row["needed"] - row["log_odds"], row["shard"], row["row"]) for row in lost if row["class"] == c)
        tiles = [tile for tile in page.of("below_k") if tile["data-class"] == str(c)]
        assert [(t["data-shard"], int(t["data-row"])) for t in tiles] == [place[1:] for place in near[:BELOW]]
        seen += len(tiles)
    assert seen == len(page.of("below_k"))
    assert seen >= 20  # most classes have some


def test_every_picture_is_that_of_its_image(mpl, run) -> None:
    page = report(mpl, run)
    shards = {shard.name: shard for shard in digits_shards("pool", False)}
    assert len(page.of("kept")) == 10 * 24
    assert sum(name == "img" for name, _ in page.tags) == len(page.tiles)
    for tile in page.tiles:
        (picture,) = tile["pictures"]
        assert np.array_equal(pixels(picture), pixels_in(shards[tile["data-shard"]], int(tile["data-row"])))


def test_the_page_needs_nothing_else_and_runs_nothing(mpl, run) -> None:
    page = report(mpl, run)
    assert {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"} == set()
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "background"):
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
    assert not re.search(r"url\(|@import|https?://", page.text)
    (policy,) = (tag["content"] for name, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_training_and_evaluation_are_there(mpl, run) -> None:
    text = " ".join(report(mpl, run).texts)
    judged = json.loads((run / "evaluation.json").read_text())
    assert f"{judged['top1']:.2f}%" in text
    for words in ("teacher", "student", "loss, nats", "Reduced MPL", "residual"):
        assert words in text


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def rewrite(path: Path, change) -> None:
    """Put a Parquet file back with rows changed and its schema kept."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist([change(row) for row in table.to_pylist()], table.schema), path)


def test_keys_from_the_web_do_no_harm(mpl, run) -> None:
    """Hostile keys in the selection and the rejects; they differ from the pool's, so no picture is shown."""
    for path in [run / "selection.parquet", *(run / "rejected").glob("*.parquet")]:
        rewrite(path, lambda row: row | {"key": HOSTILE})
    page = report(mpl, run)
    assert {name for name, _ in page.tags} & {"script", "img"} == set()
    assert not any(attribute.startswith("on") for _, tag in page.tags for attribute in tag)
    assert sum(HOSTILE in text for text in page.texts) >= len(page.tiles) > 240
    assert "<script" not in page.text
    assert page.text.count("onerror") == page.text.count("&#34;&#39;&gt;&lt;img src=x onerror=alert(2)&gt;")
    assert any("row" in text and "is now" in text for text in page.texts)


def test_copies_stand_beside_their_match(mpl, run) -> None:
    """Two rejects are declared a copy and a repeat; the record then disagrees, which the page tells."""
    path = run / "rejected/part-pool-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    copy, repeat, broken = rows[0]["row"], rows[1]["row"], rows[2]["row"]
    changes = {
        copy: {"reason": "eval_copy", "mirrored": True, "similarity": 0.875, "match": "test/test/7"},
        repeat: {"reason": "repeat_of", "similarity": 1.0, "match": "pool-00000/5"},
        broken: {"reason": "decode_error", "detail": "OSError: <b>cut</b>"},
    }
    above = {"class": None, "log_odds": None, "needed": None}
    rewrite(path, lambda row: row | above | changes[row["row"]] if row["row"] in changes else row)
    record = json.loads((run / "filter/record.json").read_text())
    page = report(mpl, run)
    pool, (test,) = digits_shards("pool", False), digits_shards("test", True)
    (tile,) = page.of("eval_copy")
    assert np.array_equal(pixels(tile["pictures"][0]), pixels_in(pool[1], copy))
    assert np.array_equal(pixels(tile["pictures"][1]), pixels_in(test, 7))
    (tile,) = page.of("repeat_of")
    assert np.array_equal(pixels(tile["pictures"][0]), pixels_in(pool[1], repeat))
    assert np.array_equal(pixels(tile["pictures"][1]), pixels_in(pool[0], 5))
    assert "0.875 mirrored" in page.texts
    assert "OSError: <b>cut</b>" in page.texts
    assert any(f"record counts {record['result']['rejected']}" in text for text in page.texts)


def as_before(run: Path) -> None:
    """Put rejected/ and the record of `filter` back into what the version before wrote: numbers in a sentence."""
    for path in (run / "rejected").glob("*.parquet"):
        table = pq.read_table(path)
        rows = [
            row | {"detail": f"{row['class']}: log-odds {row['log_odds']:.4f}, needs {row['needed']:.4f}"}
            for row in table.to_pylist()
        ]
        schema = pa.schema([table.schema.field(name) for name in ("key", "shard", "row", "reason", "detail",
                                                                 "similarity", "match")])  # fmt: skip
        metadata = {**table.schema.metadata, b"mpl.version": b"1"}
        pq.write_table(pa.Table.from_pylist(rows, schema).replace_schema_metadata(metadata), path)
    path = run / "filter/record.json"
    record = json.loads(path.read_text())
    del record["basis"]["rejected_format"]
    write_sealed(path, record | {"fingerprint": fingerprint(record["basis"])})


def test_rejects_of_the_version_before_are_made_again_from_the_same_scores(mpl, run) -> None:
    """The page says what to run; `mpl filter` does it without the teacher, and the targets stay fresh."""
    wanted = {path: path.read_bytes() for path in [run / "selection.parquet", *(run / "rejected").iterdir()]}
    scores = {path: path.stat().st_mtime_ns for path in (run / "scores").iterdir()}
    before = report(mpl, run)
    as_before(run)
    page = report(mpl, run)
    assert page.of("kept") == before.of("kept")
    assert not page.of("below_k")
    (note,) = (text for text in page.texts if "version 1" in text)
    assert "2 of 2 files of rejected/ cannot be used" in note
    assert "run mpl filter, which makes rejected/ again from the same scores, without the teacher" in note
    assert "already done" in mpl("precompute", "--run", run).err
    outcome = mpl("filter", "--run", run)
    assert outcome.status == 0
    assert "filter: made again: rejected_format: None → 2" in outcome.err
    assert "images a second" not in outcome.err
    assert {path: path.read_bytes() for path in wanted} == wanted
    assert {path: path.stat().st_mtime_ns for path in scores} == scores
    for stage in ("filter", "precompute", "train-reduced"):
        assert "already done" in mpl(stage, "--run", run).err
    assert report(mpl, run).tiles == before.tiles


def test_without_the_pool_the_page_has_no_pictures_and_says_so(mpl, run) -> None:
    before = report(mpl, run)
    description = json.loads((run / "run.json").read_text())
    description["recipe"]["data"]["manifest"] = "gone.yaml"
    (run / "run.json").write_text(json.dumps(description))
    page = report(mpl, run)
    assert len(page.tiles) == len(before.tiles)
    assert not any(tile["pictures"] for tile in page.tiles)
    assert any("No pictures from the unlabelled split" in text and "gone.yaml" in text for text in page.texts)


def test_a_shard_that_changed_gives_no_pictures(mpl, run) -> None:
    record = json.loads((run / "filter/record.json").read_text())
    record["result"]["scores_fingerprint"] = "of other scores"
    write_sealed(run / "filter/record.json", record)
    page = report(mpl, run)
    assert not any(tile["pictures"] for tile in page.tiles)
    assert any("changed since it was scored" in text for text in page.texts)


def test_a_run_is_reported_at_every_stage(mpl, tmp_path, recipe) -> None:
    run = tmp_path / "new"
    assert mpl("pretrain", "--recipe", recipe, "--run", run).status == 0
    page = report(mpl, run)
    assert not page.tiles
    assert any("not been filtered" in text for text in page.texts)
    assert "teacher" in page.texts
    assert mpl("filter", "--run", run, "--k", 5000, "--min-probability", 0.3).status == 0
    page = report(mpl, run, "--images", IMAGES)
    selection = pq.read_table(run / "selection.parquet")
    empty = set(range(10)) - set(selection["class"].to_pylist())
    assert {int(tile["data-class"]) for tile in page.of("kept")} == set(range(10)) - empty
    floor = f"{np.log(0.3 / 0.7):.4f}".replace("-", "−")
    for c in range(10):
        assert class_row(page, str(c))[-1] == floor
    assert max(float(tile["data-log-odds"]) for tile in page.of("below_probability")) < np.log(0.3 / 0.7)


def test_outputs_in_object_storage_give_the_same_page(mpl, run) -> None:
    """With scores/, rejected/ and the selection behind a URL."""
    before = report(mpl, run)
    description = json.loads((run / "run.json").read_text()) | {"store": "memory://reports/run"}
    (run / "run.json").write_text(json.dumps(description))
    for name in ("scores", "rejected", "selection.parquet"):
        for path in [*(run / name).rglob("*.parquet"), run / name]:
            if path.is_file():
                remote = UPath("memory://reports/run") / path.relative_to(run).as_posix()
                remote.parent.mkdir(parents=True, exist_ok=True)
                remote.write_bytes(path.read_bytes())
                path.unlink()
    assert report(mpl, run).tiles == before.tiles
    assert len(before.tiles) > 240


def test_examples_from_few_shards_are_said_to_be(mpl, run) -> None:
    page = report(mpl, run, "--shards", 1)
    assert len({tile["data-shard"] for tile in page.tiles}) == 1
    assert "1 of 2 shards" in " ".join(page.texts)
    assert len(page.of("kept")) > 100


def test_the_result_as_json_and_elsewhere(mpl, run, tmp_path) -> None:
    output = tmp_path / "deep/page.html"
    outcome = mpl("report", "--run", run, "--output", output, "--images", 0, "--json")
    result = json.loads(outcome.out.splitlines()[-1])
    assert result == {"output": str(output), "bytes": output.stat().st_size, "classes": 10, "pictures": 0, "notes": []}
    assert not (run / "report.html").exists()


def test_what_goes_wrong_is_told(mpl, run, tmp_path) -> None:
    outcome = mpl("report", "--run", tmp_path / "nothing")
    assert outcome.status == 1
    assert "there is no run" in outcome.err
    (tmp_path / "file").write_text("")
    outcome = mpl("report", "--run", run, "--output", tmp_path / "file/page.html")
    assert outcome.status == 1
    assert "cannot write" in outcome.err
    (run / "selection.parquet").write_bytes((run / "selection.parquet").read_bytes()[:-20])
    page = report(mpl, run)
    assert not page.tiles
    assert any("selection.parquet" in text and "filter again" in text for text in page.texts)
