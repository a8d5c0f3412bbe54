"""The one place through which text reaches a terminal: foreign names cannot steer it, addresses show no secrets."""

import re
import threading
import unicodedata
from collections.abc import Callable

import click

CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]*@")  # user:password@
QUERY = re.compile(r"(?P<address>[A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"]+)\?[^\s)'\",;]+")  # may hold a signature

SILENCE = 1.5  # seconds


def plain(text: str) -> str:
    """Text as it may be shown: control characters, overrides of direction and bytes that are no text are escaped;
    user names, passwords and queries of addresses are left out."""
    text = QUERY.sub(r"\g<address>?…", CREDENTIALS.sub(r"\g<scheme>…@", text))
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def say(text: str, *, err: bool = True) -> None:
    """A line for people, on standard error."""
    _heard.set()
    click.echo(plain(text), err=err)


_heard = threading.Event()


def sign_of_life(text: str, after: float = SILENCE) -> Callable[[], None]:
    """Say `text` where nothing else is said for so many seconds from here; returns what calls it off."""
    _heard.clear()

    def wait() -> None:
        if not _heard.wait(after):
            say(text)

    threading.Thread(target=wait, daemon=True).start()
    return _heard.set
