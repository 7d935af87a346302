"""Conversations in OpenAI's form: roles, texts, and pictures, videos and sounds among them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from weft.data.media.blob import Fault
from weft.data.media.items import Kind

ROLES = ("system", "developer", "user", "assistant", "tool")
_KINDS: dict[str, Kind] = {"image": "picture", "video": "video", "audio": "sound"}
_TYPES = {
    f"{before}{word}{after}": word for word in _KINDS for before in ("", "input_") for after in ("", "_url")
}
_FIELDS = ("url", "path", "file", "data")
START, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Text:
    """A stretch of text that is tokenized alone.

    Attributes:
        text: as it stands.
        counted: whether its tokens are targets that count.
        control: whether control tokens in it have their meaning.
    """

    text: str
    counted: bool = False
    control: bool = False


@dataclass(frozen=True)
class Reference:
    """A picture, video or sound, as it is named.

    Attributes:
        kind: what it is.
        names: files, or data inside the line; several for the frames of a video.
        encoder: who shall read it; empty: the first encoder of this kind.
    """

    kind: Kind
    names: tuple[str, ...]
    encoder: str = ""


Span = Text | Reference


@dataclass(frozen=True)
class Turn:
    """What one role says."""

    role: str
    spans: tuple[Span, ...]


def parse(messages: Any) -> tuple[Turn, ...]:
    """The turns of ``[{"role": ..., "content": text or list of parts}, ...]``.

    A part is ``{"type": "text", "text": ...}`` or names a file: ``{"type": "image_url", "image_url":
    {"url": ...}}``, ``{"type": "input_audio", "input_audio": {"data": ..., "format": ...}}``, ``{"type":
    "video", "video": ... or a list of frames}``; also ``image``, ``audio`` and the like, and a plain name in
    place of the inner object. ``encoder`` beside ``type`` names the encoder.

    Raises:
        Fault: it is not of this form.
    """
    if not isinstance(messages, list) or not messages:
        raise Fault("wrong messages", f"`messages` must be a list of turns, not {_kind(messages)}")
    return tuple(_turn(entry, number) for number, entry in enumerate(messages, 1))


def _turn(entry: Any, number: int) -> Turn:
    if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
        raise Fault("wrong messages", f"turn {number} must be an object with `role` and `content`")
    role, content = entry["role"], entry["content"]
    if role not in ROLES:
        raise Fault("unknown role", f"turn {number} has the role {role!r}; known are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Fault("wrong messages", f"`content` of turn {number} is {_kind(content)}, not text or a list")
    return Turn(role, tuple(_part(part, number) for part in parts))


def _part(part: Any, number: int) -> Span:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if not isinstance(kind, str) or kind not in _TYPES:
        known = "text, image_url, input_audio, video"
        raise Fault("unknown part", f"turn {number} has a part of type {kind!r}; known are {known}")
    word = _TYPES[kind]
    value = next((part[key] for key in (kind, word, f"{word}_url", *_FIELDS) if key in part), None)
    names = tuple(_name(each) for each in (value if isinstance(value, list) and word == "video" else [value]))
    if not all(names):
        raise Fault("wrong messages", f"turn {number} has a part of type {kind!r} that names no file")
    return Reference(_KINDS[word], names, str(part.get("encoder", "")))


def _name(value: Any) -> str:
    """The file that a value names, or its data with the mark of such."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return ""
    key = next((key for key in _FIELDS if isinstance(value.get(key), str)), "")
    name = value.get(key, "")
    return f"data:;base64,{name}" if key == "data" and not name.startswith("data:") else name


def render(turns: Sequence[Turn], template: Literal["plain", "chatml"]) -> Iterator[Span]:
    """What is tokenized, in order; texts of the assistant, and what ends its turns, count.

    The end token of the document comes after it.
    """
    for number, turn in enumerate(turns, 1):
        answer = turn.role == "assistant"
        if template == "chatml":
            yield Text(START, control=True)
            yield Text(f"{turn.role}\n")
        yield from (replace(s, counted=answer) if isinstance(s, Text) else s for s in turn.spans)
        if template == "chatml":
            yield Text(END, counted=answer, control=True)
            yield Text("\n")
        elif number < len(turns):
            yield Text("\n", counted=answer)


def _kind(value: Any) -> str:
    return "empty" if value in ([], "", None) else f"of type {type(value).__name__}"
