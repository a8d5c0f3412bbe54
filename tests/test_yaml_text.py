"""YAML from anywhere."""

import pytest

from pipeline.classes import canonical, in_order
from pipeline.config import load_recipe
from pipeline.errors import RecipeError
from pipeline.yaml_text import parse_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("[" * 20_000, "deep"),
        ("9" * 5_000, "digits"),
        ("a: [", "expected"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
    ids=["laughs", "itself", "deep", "digits", "open", "code"],
)
def test_what_is_no_plain_value_is_one_error(text: str, why: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=why):
        parse_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_aliases_are_read() -> None:
    assert parse_yaml("a: &a {lr: 1}\nb: *a") == {"a": {"lr": 1}, "b": {"lr": 1}}


def test_a_class_name_of_more_digits_than_a_number_has_is_a_name() -> None:
    long = "0" + "9" * 5_000
    assert canonical(long) == long
    assert in_order([long, "2", "10"]) == [long, "10", "2"]
    assert in_order(["10", "02"]) == ["02", "10"]
