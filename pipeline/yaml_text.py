"""YAML from anywhere: values alone, of bounded size."""

from typing import Any

import yaml

NODES = 1_000_000
"""Values in a text, aliases counted as often as they stand in it."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is no YAML, too deep, or its aliases (`*name`) make it larger than `NODES`.
    """
    try:
        value = yaml.safe_load(text)
        if _nodes(value, {}) > NODES:
            raise ValueError(f"its aliases make it larger than {NODES:,} values")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _nodes(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, aliases counted as often as they stand in it; one that holds itself is endless."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = NODES + 1  # while it is counted
        known[id(value)] = 1 + sum(_nodes(v, known) for v in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]
