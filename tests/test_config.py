"""Recipes: every shipped one, and every way to get one wrong."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import load_recipe, parse_recipe, recipe_names
from pipeline.errors import RecipeError

RECIPES = [
    *(
        "cifar10",
        "cifar10-4000",
        "cifar10-4k",
        "cifar10-4k-google",
        "cifar10-correction",
        "cifar10-foreign-teacher",
        "cifar10-small",
        "digits",
        "imagenet",
        "imagenet-10pct",
    ),
    *("imagenet-10pct-google", "imagenet-jft", "svhn", "svhn-1k"),
]


def test_shipped_recipes() -> None:
    assert recipe_names() == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    tree = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert parse_recipe(tree, "copy") == recipe


@pytest.mark.parametrize(
    ("name", "k", "hidden"), [("cifar10", 50000, 128), ("svhn", 35000, 128), ("imagenet", 12800, 512)]
)
def test_the_papers_numbers(name: str, k: int, hidden: int) -> None:
    """arXiv:2003.10580v1, section 4.2 and appendix C.2."""
    recipe = load_recipe(name)
    calibrator = recipe.train_reduced.calibrator
    assert recipe.filter.k == k
    assert (calibrator.hidden, calibrator.layers, calibrator.lr, calibrator.eps) == (hidden, 5, 1e-4, 1e-7)
    assert calibrator.weight_decay == 1e-4
    optimizer = recipe.train_reduced.optimizer
    assert (optimizer.rule, optimizer.momentum, optimizer.alpha, optimizer.eps) == (
        "rmsprop_tf",
        0.9,
        0.9,
        1e-3,
    )
    assert optimizer.lr == pytest.approx(0.256 * recipe.train_reduced.batch / 4096)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECIPES
        if name not in ("cifar10-4000", "cifar10-correction", "cifar10-foreign-teacher", "cifar10-small", "digits")
    ],
)
def test_the_papers_finetuning_has_a_fixed_rate(name: str) -> None:
    """arXiv:2003.10580v4, sections 3.2 (1e-5) and 3.3 (1e-4)."""
    finetune = load_recipe(name).finetune
    assert (finetune.schedule.kind, finetune.schedule.warmup_steps) == ("constant", 0)
    assert finetune.optimizer.lr == (1e-4 if name in ("imagenet", "imagenet-jft") else 1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "batches", "lrs", "dropouts", "uda", "decay", "smoothing"),
    [
        ("cifar10-4k", 1_000_000, 2000, (128, 128), (0.3, 0.125), (0.35, 0.5), (1.0, 0.8), 5e-4, 0.0),
        ("svhn-1k", 1_000_000, 2000, (128, 128), (0.15, 0.05), (0.45, 0.65), (2.5, 1.25), 5e-4, 0.0),
        ("imagenet-10pct", 500_000, 1000, (2048, 2048), (0.8, 0.5), (0.1, 0.1), (16.0, 0.75), 2e-4, 0.1),
        ("cifar10-4k-google", 300_000, 5000, (896, 128), (0.05, 0.05), (0.2, 0.2), (8.0, 0.7), 5e-4, 0.15),
        ("imagenet-10pct-google", 700_000, 5000, (15_360, 1024), (0.4, 0.6), (0.1, 0.1), (20.0, 0.5), 1e-4, 0.1),
    ],
)
def test_settings_of_full_mpl(name, steps, warmup, batches, lrs, dropouts, uda, decay, smoothing) -> None:
    """arXiv:2003.10580v1, table 3; and Google's published flags, whose rates are per 256 labelled images."""
    section = load_recipe(name).train_mpl
    assert section is not None
    teacher_model = section.teacher.model or section.model
    teacher = section.teacher.optimizer
    assert teacher is not None
    assert section.steps == steps
    assert (section.batch, section.labelled_batch) == batches
    assert (section.optimizer.lr, teacher.lr) == lrs
    assert (section.model.dropout, teacher_model.dropout) == dropouts
    assert (section.method.weight, section.method.temperature) == uda
    assert section.label_smoothing == smoothing
    for optimizer in (section.optimizer, teacher):
        assert (optimizer.rule, optimizer.momentum, optimizer.weight_decay) == ("nesterov", 0.9, decay)
    for schedule in (section.schedule, section.teacher.schedule):
        assert (schedule.kind, schedule.warmup_steps, schedule.final_fraction) == ("cosine", warmup, 0.0)
    finetune = load_recipe(name).finetune
    assert (finetune.optimizer.lr, finetune.batch) == (1e-5, 512)
    assert finetune.steps == (2000 if "imagenet" in name else 1000)


def test_changes_apply_and_numbers_in_e_notation_are_numbers() -> None:
    recipe = load_recipe("digits", ["pretrain.optimizer.lr=1e-3", "train_reduced.teacher=fixed"])
    assert recipe.pretrain.optimizer.lr == 1e-3
    assert recipe.train_reduced.teacher == "fixed"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_recipe("digits").filter.k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train_reduced.calibrator.hiden=3", "did you mean train_reduced.calibrator.hidden?"),
        ("trainreduced.steps=3", "did you mean train_reduced?"),
        ("pretrain.steps=0", "pretrain.steps"),
        ("pretrain.steps=1.5", "pretrain.steps"),
        ("pretrain.optimizer.momentum=1.0", "pretrain.optimizer.momentum"),
        ("pretrain.optimizer.lr=.nan", "pretrain.optimizer.lr"),
        ("pretrain.schedule.warmup_steps=5000", "must be below steps"),
        ("name.first=3", "is a value, not a section"),
        ("=3", "expected section.key=value"),
        ("filter.k=[", "not YAML"),
    ],
)
def test_mistakes_are_explained(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        load_recipe("digits", [change])


@pytest.mark.parametrize(("text", "words"), [("- a", "mapping"), ("a: [", "not YAML"), ("name: x", "data is missing")])
def test_bad_files_are_explained(text: str, words: str, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_a_setting_stands_once_and_a_recipe_is_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nfilter: {k: 5, k: 6}\n")
    with pytest.raises(RecipeError, match="'k' stands twice"):
        load_recipe(str(path))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="no plain file"):
        load_recipe(str(tmp_path / "pipe.yaml"))
