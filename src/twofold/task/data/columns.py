"""The fields of a row under names of their own: its audio, image, text, target and label."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.task.data.settings import Columns
from twofold.task.text.formats import ANSWERS, INDEX, QUESTIONS
from twofold.task.text.row import MEND, MOST_NAMED, BadRowError, Fields, kind, whole

Kind = Literal["audio", "image", "text"]
MEDIA = ("audio", "image")
FILE = ("file", "file_name", "path")
# Where a field stands in a row if no column is named: the first of these that is there.
USUAL: dict[str, tuple[str, ...]] = {
    "audio": ("audio", *FILE, "audio_file_name", "audio_path", "audio_filepath"),
    "image": ("image", "img", *FILE, "image_file_name", "image_path"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "caption"),
    "target": ("target",),
    "label": ("label", "labels", "class"),
}
OF_TEXTS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "source", "sentence1", "premise", "tokens", "prompt", *QUESTIONS),
    "target": ("target", "summary", "sentence2", "hypothesis", *ANSWERS),
    "label": ("label", "labels", "class", "score", "ner_tags"),
}
MEND_FILE = "mend the file or take it away, or leave out such files with `skip_bad`"


@dataclass(frozen=True)
class Record:
    """One clip, image or text, and what is known of it.

    ``fields`` has those of "audio", "image", "text", "target" and "label" that are there. Audio and images are what
    ``load_audio`` and ``load_image`` take; a text or a target is a str, or a list of words.
    """

    place: str
    fields: Mapping[str, Any]
    others: tuple[str, ...] = ()  # fields that it has besides
    of_file: bool = False  # it is a file, and no row

    @property
    def mend(self) -> str:
        """What to do if it is bad."""
        return MEND_FILE if self.of_file else MEND

    def need(self, name: str) -> Any:
        """Return what a field holds.

        Raises:
            BadRowError: if it is not there, saying where it could come from.
        """
        if name in self.fields:
            return self.fields[name]
        if self.of_file:
            raise BadRowError(
                f'there is no {name} for it; put rows with "file" and "{name}" into words.jsonl in its folder'
            )
        raise BadRowError(f"there is no {name} in it{_of(name, self.others, 'other fields')}")


def read_columns(row: Any, place: str, settings: Columns, medium: Kind) -> Record:
    """Return a row as a record.

    Args:
        medium: what it must hold.

    Raises:
        BadRowError: if that is not there, or a field that the settings name is not.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"a row must be a JSON object, this is {kind(row)}")
    given = Fields(row).values
    fields: dict[str, Any] = {}
    read: set[str] = set()
    for name, usual in (USUAL if medium in MEDIA else OF_TEXTS).items():
        asked = getattr(settings, f"{name}_column")
        if name in MEDIA and name != medium:
            continue
        key, held = _found(given, usual) if asked == name else _named(given, asked, name)
        wrong = _wrong(held) if key and name in ("text", "target") else ""
        if wrong and (name == medium or asked != name):
            raise BadRowError(f"its {name}, {key!r}, {wrong}")
        if key and not wrong and (name == medium == "text" or not _is_blank(held)):
            fields[name] = held
            read.add(key)
    if medium not in fields:
        raise BadRowError(f"there is no {medium} in it{_of(medium, _flat(given), 'fields')}")
    rest = (str(key) for key, held in given.items() if key not in read and not _is_blank(held))
    others = tuple(key for key in rest if not INDEX.fullmatch(key))
    return Record(place, fields, others)


def _found(given: Mapping[str, Any], usual: Sequence[str]) -> tuple[str, Any]:
    """Return the first of the usual fields that holds something, or else the first that is there, and what it holds."""
    there = [key for key in usual if key in given]
    key = next((key for key in there if not _is_blank(given[key])), there[0] if there else "")
    return key, given.get(key)


def _named(given: Mapping[str, Any], column: str, name: str) -> tuple[str, Any]:
    """Return the field that a column names, and what it holds: a field, a part of one ("translation.en"), or a language.

    Raises:
        BadRowError: if there is none.
    """
    if column in given:
        return column, given[column]
    outer, _, inner = column.partition(".") if "." in column else ("translation", "", column)
    held = given.get(outer)
    if isinstance(held, Mapping) and held.get(inner) is not None:
        return outer, held[inner]
    raise BadRowError(f"there is no {column!r} in it{_of(name, _flat(given), 'fields')}")


def _is_blank(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | tuple) and not value)
    )


def _flat(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of fields, with those of the languages of a translation."""
    return [
        name
        for key, held in fields.items()
        for name in (
            [f"{key}.{inner}" for inner in held] if key == "translation" and isinstance(held, Mapping) else [key]
        )
    ]


def _of(name: str, fields: Collection[str], what: str) -> str:
    """Say which fields there are, and how to name the right one."""
    named = ", ".join(str(field)[:40] for field in list(fields)[:MOST_NAMED])
    more = f" and {len(fields) - MOST_NAMED} more" if len(fields) > MOST_NAMED else ""
    has = f": its {what} are {named}{more}" if fields else ""
    return f"{has}; name the field with its {name} by `{name}_column`"


def _wrong(value: Any) -> str:
    """Say what is wrong with a text, or a list of words."""
    for word in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(word, str):
            return f"must be a text or a list of words, it holds {kind(word)}"
        try:
            whole(word, "")
        except BadRowError:
            return "holds half of a character (a lone surrogate)"
    return ""
