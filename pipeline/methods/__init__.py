"""Methods by name: each module here holds one, and adding another is adding a file.

Nothing here imports torch, so that a recipe is read without it.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from pipeline.methods.method import Lesson, Method, Rows, Views

__all__ = ["Lesson", "Method", "Rows", "Views", "method_names", "parse_method"]


@cache
def method_names() -> tuple[str, ...]:
    """Names of the methods, which are the names of their modules."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "method"))


def parse_method(value: Any) -> Method:
    """A method from its name, or from a section of settings with `name`.

    Raises:
        ValueError: no such method, or a setting that it does not have (pydantic says which).
    """
    if isinstance(value, Method):
        return value
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or "name" not in settings:
        raise ValueError(f"a method is a name or a section with `name`, one of {', '.join(method_names())}")
    name = settings["name"]
    if name not in method_names():
        close = difflib.get_close_matches(str(name), method_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no method {name!r}{hint} There are: {', '.join(method_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (kind,) = (
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module.__name__
    )
    wrong = sorted(settings.keys() - kind.model_fields.keys())
    if wrong:
        known = sorted(kind.model_fields.keys() - {"name"}) or ["none"]
        raise ValueError(f"method {name} has no setting {', '.join(wrong)}; it has: {', '.join(known)}")
    return kind(**settings)
