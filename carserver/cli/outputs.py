"""`carserver outputs …`: looking at outputs, and getting the content of one."""

import base64
import hashlib
import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec
from msgspec import Raw, Struct, UnsetType

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import at_terminal, data, json_data, local_time, note, utc_time
from carserver.cli.plain import visible, visible_lines
from carserver.cli.table import print_table
from carserver.protocol.outputs import (
    Artifact,
    Content,
    FileRef,
    Final,
    OutputRecord,
    OutputSlice,
    Partial,
    Progress,
)

if TYPE_CHECKING:
    from carserver.client import Connection

_HEADINGS = ("OUTPUT", "TYPE", "TASK", "ATTEMPT", "PRODUCER", "CREATED", "WHAT")
_WHOLE = frozenset({"OUTPUT", "TYPE", "ATTEMPT", "CREATED"})
_PAGE = 1_000  # the daemon's own bound
_SLICE = 1024 * 1024  # likewise, in bytes


class _Page(Struct):
    outputs: list[Raw]
    next_page: str | None = None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def outputs() -> None:
    """Look at outputs, or read the content of one."""


@outputs.command("ls")
@click.option("--task", "task_id", metavar="ID", help="Only those of this task.")
@click.option("--attempt", type=click.IntRange(min=0), metavar="N", help="Only those of this attempt of the task.")
@click.option("--limit", type=click.IntRange(min=1), default=_PAGE, metavar="N", help="How many at most. [1000]")
@click.option("--json", "as_json", is_flag=True, help="One output a line, as the daemon has it.")
@daemon_options
def list_outputs(
    *,
    task_id: str | None,
    attempt: int | None,
    limit: int,
    as_json: bool,
    state_dir: str | None,
    url: str | None,
) -> None:
    """List outputs in the order of their appending.

    At a terminal it is a table, in a pipe tab-separated lines.
    """
    if attempt is not None and task_id is None:
        raise CommandError("--attempt needs --task: attempts are counted within a task", ExitCode.USAGE)
    found, more = _found(Daemon(state_dir, url), {"task_id": task_id, "attempt": attempt}, limit)
    if as_json:
        for raw in found:
            json_data(raw, indented=False)
    else:
        _show([msgspec.json.decode(raw, type=OutputRecord) for raw in found])
    if more:
        note(f"there are more: these are the first {limit}; --limit asks for more of them")
    elif not found:
        note("no such output")


def _found(daemon: Daemon, filters: dict[str, Any], limit: int) -> tuple[list[Raw], bool]:
    """The outputs that fit, at most `limit`, and whether there are more."""
    from carserver.cli.talk import ANSWER_S, talk  # noqa: PLC0415 - brings websockets

    open_connection = daemon.looker(notifications=0)

    async def conversation() -> tuple[list[Raw], bool]:
        found: list[Raw] = []
        params = dict(filters)
        async with open_connection() as connection:
            while True:
                params["limit"] = min(limit - len(found), _PAGE)
                page = await connection.call("outputs.list", params, ANSWER_S, result_type=_Page)
                found += page.outputs
                if page.next_page is None or len(found) >= limit:
                    return found, page.next_page is not None
                params["page"] = page.next_page

    return talk(conversation())


@outputs.command("get")
@click.argument("output_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="The record, as the daemon has it.")
@daemon_options
def get_output(*, output_id: str, as_json: bool, state_dir: str | None, url: str | None) -> None:
    """Show the record of output ID."""
    from carserver.cli.talk import ask  # noqa: PLC0415 - brings websockets

    raw = ask(Daemon(state_dir, url).looker(notifications=0), "outputs.get", {"id": output_id})
    if as_json:
        json_data(raw)
        return
    for name, value in msgspec.json.decode(raw, type=dict[str, Raw]).items():
        data(f"{visible(name):<20} {_member(name, value)}")


@outputs.command("read")
@click.argument("output_id", metavar="ID")
@click.option("--offset", type=click.IntRange(min=0), default=0, metavar="N", help="Begin at this byte. [0]")
@click.option("--length", type=click.IntRange(min=1), metavar="N", help="At most so many bytes. [all]")
@daemon_options
def read_output(*, output_id: str, offset: int, length: int | None, state_dir: str | None, url: str | None) -> None:
    """Write the content of output ID to standard output.

    In a pipe it is the very bytes, at a terminal visible text. What is read whole is compared with the SHA-256 that was
    taken when it was appended.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).looker(notifications=0)

    async def conversation() -> None:
        async with open_connection() as connection:
            await _write(connection, output_id, offset, length)

    talk(conversation())


async def _write(connection: "Connection", output_id: str, offset: int, length: int | None) -> None:
    """Slice after slice, until the end of the content or of what is wanted."""
    from carserver.cli.talk import ANSWER_S  # noqa: PLC0415 - brings websockets

    digest = hashlib.sha256()
    at = offset
    end = None if length is None else offset + length
    while end is None or at < end:
        wanted = _SLICE if end is None else min(end - at, _SLICE)
        params = {"id": output_id, "offset": at, "length": wanted}
        part = await connection.call("outputs.read", params, ANSWER_S, result_type=OutputSlice)
        content = part.data.encode() if part.encoding == "utf8" else base64.b64decode(part.data)
        if end is not None and at > offset and at + len(content) > end:
            return  # a character that does not fit any more
        _write_part(content, part)
        digest.update(content)
        at += len(content)
        if part.eof:
            if offset == 0 and digest.hexdigest() != part.sha256:
                raise CommandError(f"what was read of {visible(output_id)} is not what was appended: SHA-256 differs")
            return


def _write_part(content: bytes, part: OutputSlice) -> None:
    if not at_terminal():
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    elif part.encoding == "utf8":
        sys.stdout.write(visible_lines(part.data))
        if part.eof and not part.data.endswith("\n"):
            sys.stdout.write("\n")  # the prompt that follows is none of it
        sys.stdout.flush()
    else:
        raise CommandError(f"{part.size} bytes that are no text: send them to a file or a pipe", ExitCode.USAGE)


def _show(records: list[OutputRecord]) -> None:
    if not at_terminal():
        for record in records:
            data("\t".join(visible(cell) for cell in _cells(record, utc_time(record.created_at_ms))))
    elif records:
        rows = [_cells(record, local_time(record.created_at_ms, "%m-%d %H:%M")) for record in records]
        print_table(_HEADINGS, rows, whole=_WHOLE)


def _cells(record: OutputRecord, created: str) -> list[str]:
    tag = record.event.__struct_config__.tag
    return [
        record.id,
        str(tag),
        record.task_id,
        str(record.attempt),
        record.producer_agent,
        created,
        _what(record),
    ]


def _what(record: OutputRecord) -> str:
    """An event in a few words."""
    match record.event:
        case Progress(stage=stage, note=said):
            return f"{stage}: {said}" if said else stage
        case Partial(chunk=content):
            return _content(content)
        case Artifact(name=name, content=content):
            return f"{name}: {_content(content)}"
        case Final(content=content, ok=ok):
            return f"{'ok' if ok else 'not ok'}: {_content(content)}"


def _content(content: Content) -> str:
    if isinstance(content, FileRef):
        return f"file {content.path}"
    if isinstance(content.value, UnsetType):
        return f"{content.size} bytes"
    value = msgspec.json.decode(content.value)
    return value if isinstance(value, str) else bytes(content.value).decode()


def _member(name: str, value: Raw) -> str:
    """One member of a record, for a person."""
    decoded = msgspec.json.decode(value)
    if isinstance(decoded, str):
        return visible(decoded)
    if name == "created_at_ms":
        return local_time(decoded)
    text = msgspec.json.format(bytes(value), indent=2).decode()
    return visible_lines(text).replace("\n", "\n" + " " * 21)
