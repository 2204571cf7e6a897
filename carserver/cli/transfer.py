"""`carserver export` and `carserver import`: everything that a daemon keeps, as JSON lines, and back."""

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import counted, note


@click.command("export")
@click.argument("file", metavar="[FILE]", default="-")
@click.option("--force", is_flag=True, help="Take the place of a FILE that is there.")
@daemon_options
def export(*, file: str, force: bool, state_dir: str | None, url: str | None) -> int:
    """Write all runs and outputs to FILE, as JSON lines.

    - is standard output. FILE appears when it is complete, readable by its owner alone. What is recorded meanwhile may
    be in it or not; each run in it is as it was at one moment.
    """
    from carserver.cli.sink import new_file  # noqa: PLC0415 - brings asyncio

    daemon = Daemon(state_dir, url)
    if file == "-":
        if sys.stdout is None:
            raise CommandError("standard output is closed: name a FILE", ExitCode.USAGE)
        if sys.stdout.isatty():
            raise CommandError(
                "name a FILE, or send standard output somewhere: this is not for a terminal", ExitCode.USAGE
            )
        try:
            return _export(daemon, sys.stdout.fileno())
        except BrokenPipeError:
            raise  # whoever read has enough
        except OSError as error:
            raise CommandError(f"cannot write to standard output: {error.strerror}") from None
    with new_file(Path(file), force=force) as descriptor:
        return _export(daemon, descriptor)


def _export(daemon: Daemon, descriptor: int) -> int:
    from carserver.cli.exporter import Exporter  # noqa: PLC0415 - brings websockets
    from carserver.cli.sink import Sink, progress  # noqa: PLC0415 - likewise
    from carserver.cli.talk import talk  # noqa: PLC0415 - likewise

    open_connection = daemon.opener("host")

    async def conversation() -> Exporter:
        sink = Sink(descriptor)
        async with open_connection() as connection:
            exporter = Exporter(connection, sink)
            try:
                await exporter.export()
            finally:
                progress()
            return exporter

    done = talk(conversation())
    note(f"{counted(done.runs, 'run')}, {counted(done.events, 'event')} and {counted(done.outputs, 'output')} exported")
    if done.left_out:
        note(f"left out, because the log cannot be read: {counted(done.left_out, 'run')}")
        return ExitCode.RUNTIME
    return ExitCode.OK


@click.command("import")
@click.argument("file", metavar="FILE")
@daemon_options
def import_(*, file: str, state_dir: str | None, url: str | None) -> None:
    """Take in the runs and outputs that were exported to FILE.

    - is standard input. What is there with the same content is skipped, so an import that broke off is simply run
    again. What is there with other content ends it. Runs become the host's.
    """
    from carserver.cli.importer import batches, send  # noqa: PLC0415 - brings websockets
    from carserver.cli.sink import progress  # noqa: PLC0415 - likewise
    from carserver.cli.talk import talk  # noqa: PLC0415 - likewise

    open_connection = Daemon(state_dir, url).opener("host", notifications=0)
    with ExitStack() as stack:
        try:
            if file == "-":
                if sys.stdin is None:
                    raise CommandError("standard input is closed: name a FILE", ExitCode.USAGE)
                # Not `sys.stdin`, and not closed: while it is read it is locked, and Ctrl-C shall not wait for that.
                source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 - see above
            else:
                source = stack.enter_context(open(file, "rb"))
        except OSError as error:
            raise CommandError(f"cannot read {file}: {error.strerror}", ExitCode.USAGE) from None
        try:
            done = talk(send(open_connection, batches(source)))
        finally:
            progress()
    taken = f"{counted(done.runs, 'run')}, {counted(done.events, 'event')} and {counted(done.outputs, 'output')}"
    note(f"{taken} imported; {done.skipped:,} were there already")
