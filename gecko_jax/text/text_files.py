"""Files of texts: JSON lines in the BEIR layout, or a `.txt` with one text a line."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from gecko_jax.io import inputs, reading
from gecko_jax.text import text_formats


class TextRecord(NamedTuple):
    """A passage or a query of a file; `place` is `file:line`."""

    place: str
    id: str
    title: str
    text: str
    task: str


def read_texts(
    path: str | os.PathLike, *, allow_empty: bool = False
) -> Iterator[TextRecord]:
    """Yields the texts of a JSON-lines file in the BEIR layout, or of a `.txt` file.

    JSON lines have `_id` (or `id`), `text`, and optionally `title` and `task`. A
    passage with a title and no text uses the title as its text. `allow_empty` also
    yields texts without a visible character. Raises ValueError if a line is invalid, or
    an id occurs twice.
    """
    ids = inputs.UniqueIds()
    for place, record in read_texts_or_records(path):
        identity = inputs.id_field(place, record, "_id", "id")
        title = inputs.string_field(place, record, "title", default="").strip()
        text = inputs.string_field(place, record, "text", default="")
        if "text" not in record and not title:
            raise inputs.no_value(place, record, "text")
        text = text if text.strip() else title
        ids.add(place, identity)
        try:
            if text.strip() or not allow_empty:
                text_formats.clean(text)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        task = inputs.string_field(place, record, "task", default="")
        yield TextRecord(place, identity, title, text, task)


def read_texts_or_records(
    path: str | os.PathLike, *, any_characters: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of JSON lines, or of the lines of a `.txt` file.

    A `.txt` line becomes a record with its `text` and, as `id`, its line number.
    """
    name = pathlib.PurePath(path).name
    if not name.removesuffix(".gz").endswith(".txt"):
        yield from reading.read_records(path, any_characters=any_characters)
        return
    for place, line in reading.read_lines(path):
        yield place, {"id": place.rpartition(":")[2], "text": line}
