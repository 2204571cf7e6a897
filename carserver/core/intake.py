"""What an event must be before it is recorded: an object with a string `type`, within the limits, on one line."""

from collections.abc import Sequence

import msgspec
import orjson
from msgspec import Raw, Struct

from carserver.config import Settings
from carserver.core.runs import EFFECTS, Event
from carserver.protocol.codec import check_name, check_text, compact, decode, too_deep
from carserver.protocol.errors import invalid_params, limit_exceeded


class _Type(Struct):
    type: str


class _Prompt(Struct):
    prompt: str


class _Text(Struct):
    text: str


class _Message(Struct):
    message: str


_type_decoder = msgspec.json.Decoder(_Type)
_text_decoders: dict[str, msgspec.json.Decoder[Struct]] = {
    "prompt": msgspec.json.Decoder(_Prompt),
    "text": msgspec.json.Decoder(_Text),
    "message": msgspec.json.Decoder(_Message),
}


def take_in(events: Sequence[Raw], settings: Settings) -> list[Event]:
    """The events of one `runs.record`, checked; they are known to be JSON.

    Raises:
        RpcError: invalid_params, limit_exceeded; the path begins with `events[i]`.
    """
    if len(events) > settings.record_events:
        raise limit_exceeded("record_events", len(events), settings.record_events, "events")
    return [take_in_one(bytes(raw), settings, "", place) for place, raw in enumerate(events)]


def take_in_one(given: bytes, settings: Settings, at: str, place: int) -> Event:
    """One event, checked; it is known to be JSON, and stands at `events[place]` below `at`.

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    raw = compact(given)
    if len(raw) > settings.event_bytes:
        raise limit_exceeded("event_bytes", len(raw), settings.event_bytes, f"{at}events[{place}]")
    if raw.count(b"{") + raw.count(b"[") > settings.value_nesting and too_deep(
        raw, orjson.loads(raw), settings.value_nesting
    ):
        where = f"{at}events[{place}]"
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, where)
    try:
        type_ = _type_decoder.decode(raw).type
    except msgspec.ValidationError as error:
        raise invalid_params(f"{at}events[{place}]", f"an object with a string `type` is wanted: {error}") from None
    if len(type_) > settings.name_chars or not type_.isprintable():
        check_name(type_, settings.name_chars, f"{at}events[{place}].type")
    effect = EFFECTS.get(type_)
    if effect is None or effect.text is None:
        return Event(raw, type_, None)
    kept = decode(_text_decoders[effect.text], raw, f"{at}events[{place}]")
    text: str = getattr(kept, effect.text)
    check_text(text, "text_bytes", settings.text_bytes, f"{at}events[{place}].{effect.text}")
    return Event(raw, type_, text)


def take_in_metadata(given: bytes, settings: Settings, at: str) -> Raw:
    """A run's metadata, checked, as compact JSON (contract, section 4: only an event keeps its own spacing).

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    return _take_in_object(given, "metadata_bytes", settings.metadata_bytes, settings, at)


def take_in_outcome(given: bytes, settings: Settings, at: str) -> Raw:
    """What a run was completed with, checked, as compact JSON. What it says is not looked at.

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    return _take_in_object(given, "outcome_bytes", settings.outcome_bytes, settings, at)


def _take_in_object(given: bytes, limit: str, maximum: int, settings: Settings, at: str) -> Raw:
    raw = msgspec.json.format(given, indent=-1)
    if len(raw) > maximum:
        raise limit_exceeded(limit, len(raw), maximum, at)
    value = orjson.loads(raw)
    if type(value) is not dict:
        raise invalid_params(at, "an object is wanted")
    if too_deep(raw, value, settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, at)
    return Raw(raw)
