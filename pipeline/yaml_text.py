"""YAML from anywhere: values alone, of bounded size."""

from typing import Any

import yaml

NODES = 1_000_000
"""Values in a text, aliases counted as often as they stand in it."""


class _Once:
    """Of a loader: a key stands once in a mapping; YAML's own loaders let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"{twice!r} stands twice, in a mapping that begins in line {node.start_mark.line + 1}")
        result: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return result


class _Values(_Once, yaml.SafeLoader):
    """Plain values."""


class _Texts(_Once, yaml.BaseLoader):
    """Every value as it is written: `010` is no octal number, `no` is no truth."""


def parse_yaml(text: str, *, as_texts: bool = False) -> Any:
    """The value of a YAML text; `as_texts`: numbers and truths in it as they are written.

    Raises:
        ValueError: it is no YAML, too deep, a key stands twice, or its aliases (`*name`) make it larger than `NODES`.
    """
    try:
        value = yaml.load(text, _Texts if as_texts else _Values)  # both make plain values alone
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
