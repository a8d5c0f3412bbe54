"""What reaches a terminal: foreign names cannot steer it, addresses show no secrets."""

import os
from pathlib import Path

import pytest

from stages.terminal import plain
from tests.data.made_images import encode, noise


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x9b31m", r"\x9b31m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\u202egnp.exe", r"over\u202egnp.exe"),
        ("back\x08\x08\r", r"back\x08\x08\r"),
        ("\udcff.png", r"\udcff.png"),
        ("zwei Zeilen\n\tund ein Tab", "zwei Zeilen\n\tund ein Tab"),
        ("Ünïcödé — 猫 🐈", "Ünïcödé — 猫 🐈"),
        ("s3://key:secret@bucket/pool", "s3://…@bucket/pool"),
        ("https://user@host/x", "https://…@host/x"),
        ("https://host/a.tar?X-Amz-Signature=abc&x=1, failed", "https://host/a.tar?…, failed"),
        ("gs://b/x?token=1 (503)", "gs://b/x?… (503)"),
        ("is it there? mail a@b.c", "is it there? mail a@b.c"),
    ],
)
def test_text_is_made_plain(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert plain(shown) == shown


def test_names_of_files_and_classes_cannot_steer_the_terminal(mpl, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for place, name in enumerate(("cat", "dog\x1b[31m")):
        (photos / name).mkdir(parents=True)
        for at in range(6):
            (photos / name / f"{at}\x1b[2J.png").write_bytes(encode(noise(8, 10 * place + at)))
    (photos / "cat/bad\x07.png").write_bytes(b"no image")
    (Path(os.fsdecode(os.fsencode(photos / "cat") + b"/\xff.png"))).write_bytes(b"no image")
    for arguments in (
        ("data", "check", photos),
        ("data", "import", photos, tmp_path / "mine"),
        ("predict", "--run", tmp_path / "none", photos / "cat"),
        ("filter", "--run", tmp_path / "a\x1b[2J", "--recipe", "no\x1b[2J"),
    ):
        told = mpl(*arguments)
        assert "\x1b" not in told.err + told.out
        assert "\x07" not in told.err + told.out


def test_a_broken_pipe_to_a_process_of_ours_is_told(mpl, run, monkeypatch) -> None:
    """click takes it for a reader of the output that has gone, and ends without a word."""

    def broken(*arguments: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("stages.status.stage_names", broken)
    outcome = mpl("status", "--run", run)
    assert outcome.status == 1
    assert "a process that this one had started has ended" in outcome.err
    assert "Resume with: mpl status" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "--run", "x" * 5000),
        ("pretrain", "--run", "x" * 5000),
        ("pretrain", "--recipe", "y" * 5000),
        ("pretrain", "--data", "z" * 5000),
        ("filter", "--predictions", "p" * 5000),
        ("filter", "--k", str(10**30)),
        ("filter", "--k", str(10**12), "--upsample"),
        ("data", "import", "q" * 5000, "out"),
        ("predict", "r" * 5000),
    ],
)
def test_names_and_numbers_beyond_all_bounds(mpl, tmp_path, monkeypatch, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = mpl(*arguments)
    assert outcome.status in (1, 2)
    assert "Error" in outcome.err
    assert "Traceback" not in outcome.err
