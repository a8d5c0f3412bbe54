"""A self-contained page: a picture, what is thought of it, a button for each class; it saves shard,row,key,label.

It works without a network: its policy allows its own script and pictures, and no request.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.page.render import number, shown
from pipeline.storage.files import whole_file


@dataclass(frozen=True)
class Card:
    """One image.

    Attributes:
        shard, row, key: its identity.
        uri: of its picture; None: there is none.
        chosen: class that is chosen until a person says otherwise; None: none.
        lines: what is thought of it.
    """

    shard: str
    row: int
    key: str
    uri: str | None
    chosen: int | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class LabellingPage:
    """All that the page shows.

    Attributes:
        title, about: for people.
        class_names: in order.
        cards: in the order in which they are shown.
        saves: name of the table that the page saves.
        then: the command that takes it back.
    """

    title: str
    about: str
    class_names: Sequence[str]
    cards: Sequence[Card]
    saves: str
    then: str

    def write(self, path: Path) -> int:
        """Write the page, whole or not at all; returns its bytes."""
        data = self.render().encode()
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
        return len(data)

    def render(self) -> str:
        """As HTML; all text is escaped."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"number": number, "shown": shown}
        return environment.get_template("page.html").render(page=self, identities=_for_script(self))


def _for_script(page: LabellingPage) -> str:
    """What the script needs, as JSON that cannot end the element that it stands in."""
    content = {
        "classes": list(page.class_names),
        "images": [[card.shard, card.row, card.key] for card in page.cards],
        "saves": page.saves,
    }
    return json.dumps(content, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")
