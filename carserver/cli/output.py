"""Data on standard output, all else on standard error; what a person sees at a terminal, and what a pipe gets."""

import os
import sys
from datetime import UTC, datetime

import click
import msgspec

from carserver.cli.plain import visible_json


def at_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout.isatty()


def takes_a_view() -> bool:
    """Whether standard output is a terminal that can be painted, and has the signs of the live views."""
    return at_terminal() and os.environ.get("TERM") != "dumb" and "utf" in (sys.stdout.encoding or "").lower()


def in_colour() -> bool:
    """Whether standard output takes colour, and nobody minds (https://no-color.org)."""
    return at_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def data(line: str) -> None:
    """One line of data, out at once: somebody may be reading along."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def json_data(raw: bytes | msgspec.Raw, *, indented: bool | None = None) -> None:
    """A JSON value: indented at a terminal (or as `indented` says), else on one line; numbers as they came."""
    wide = at_terminal() if indented is None else indented
    text = msgspec.json.format(bytes(raw), indent=2 if wide else -1)
    data(visible_json(text.decode()))


def local_time(milliseconds: int, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time for a person, in the zone of this machine."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime(form)


def utc_time(milliseconds: int) -> str:
    """A time for a pipe (RFC 3339)."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(milliseconds: int) -> str:
    """A span of time as short as it can be told."""
    seconds = milliseconds // 1000
    if milliseconds < 1_000:
        return f"{milliseconds} ms"
    if milliseconds < 10_000:
        return f"{milliseconds / 1000:.1f} s"
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def size(number: int) -> str:
    """So many bytes, as short as it can be told."""
    if number < 1024:
        return counted(number, "byte")
    unit, name = (1024, "KiB") if number < 1024 * 1024 else (1024 * 1024, "MiB")
    return f"{number / unit:.1f} {name}" if number < 10 * unit else f"{number // unit:,} {name}"


def counted(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def note(message: str) -> None:
    """A line for the person, not part of the data."""
    click.echo(f"carserver: {message}", err=True)
