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


def counted(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def note(message: str) -> None:
    """A line for the person, not part of the data."""
    click.echo(f"carserver: {message}", err=True)
