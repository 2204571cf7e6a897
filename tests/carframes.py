"""What the CAR client sent, and what it took for an answer: `data/car-*.jsonl`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines() if line]


@cache
def requests() -> list[dict[str, Any]]:
    """Its requests, in the order in which they were sent; the second connection's are left out."""
    frames = [frame for frame in _lines("car-client-frames.jsonl") if "method" in frame]
    again = next(place for place, frame in enumerate(frames) if place and frame["method"] == "session.auth")
    return frames[:again]


@cache
def _answers() -> list[dict[str, Any]]:
    return [line for line in _lines("car-accepted-answers.jsonl") if "method" in line]


def accepted(request: dict[str, Any]) -> Any:
    """The result that it took of a request; None where none is known."""
    same = [line for line in _answers() if all(line[key] == request[key] for key in ("method", "params"))]
    return same[0].get("result") if same else None


def misfits(answer: Any, shape: Any, at: str = "") -> list[str]:
    """The places where `answer` lacks a member that `shape` has, or has another type there; lists by their elements."""
    if isinstance(shape, dict) and isinstance(answer, dict):
        found = [f"{at}.{name}: left out" for name in shape if name not in answer]
        common = [name for name in shape if name in answer]
        return found + [wrong for name in common for wrong in misfits(answer[name], shape[name], f"{at}.{name}")]
    if isinstance(shape, list) and isinstance(answer, list):
        return [wrong for place, element in enumerate(answer) for wrong in _fits_any(element, shape, f"{at}[{place}]")]
    return [] if type(answer) is type(shape) else [f"{at}: {answer!r} where {shape!r} was taken"]


def _fits_any(element: Any, shapes: list[Any], at: str) -> list[str]:
    found = [misfits(element, shape, at) for shape in shapes]
    return [] if not found or not all(found) else found[0]
