"""The command `carserver`: which commands there are, and how every one of them ends.

A command's module is imported when it is called for, so that `carserver health` does not wait for what others need.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import carserver
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.plain import visible

_COMMANDS = {
    "backup": "carserver.cli.backup:backup",
    "call": "carserver.cli.call:call",
    "export": "carserver.cli.transfer:export",
    "health": "carserver.cli.health:health",
    "import": "carserver.cli.transfer:import_",
    "prune": "carserver.cli.prune:prune",
    "outputs": "carserver.cli.outputs:outputs",
    "runs": "carserver.cli.runs:runs",
    "serve": "carserver.cli.serve:serve",
    "token": "carserver.cli.token:token",
    "tools": "carserver.cli.tools:tools",
}
_EPILOG = """\b
Completion:   eval "$(_CARSERVER_COMPLETE=bash_source carserver)"   (or zsh_source, fish_source)
Exit codes:   0 done, 1 failed, 2 usage or configuration, 3 not found, 69 unreachable, 75 timed out, 77 not authorised
"""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _ReaderGone(Exception):
    """Standard output is closed at the other end; under a name that click does not make an exit code 1 of."""


class _LazyGroup(click.Group):
    """Knows its commands by name, and imports the one that is called for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ReaderGone from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            _discard_output()
            raise CommandError(f"cannot write: {error.strerror}; make room, or send the output elsewhere") from None
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(carserver.__version__, prog_name="carserver")
def cli() -> None:
    """The shared recorder and control point of AI-agent runs: a daemon, and the commands that talk to it."""


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    if sys.stdout is None:
        sys.exit(_complain("standard output is closed: give it somewhere to go, such as /dev/null", ExitCode.RUNTIME))
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command; every way in which it can end is one of the exit codes, and at most one line."""
    try:
        result = cli.main(list(arguments), prog_name="carserver", standalone_mode=False)
    except _ReaderGone:
        _discard_output()
        return ExitCode.OK
    except (click.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except click.UsageError as error:
        return _usage(error)
    except click.ClickException as error:
        return _complain(error.format_message(), ExitCode.USAGE)
    except CommandError as error:
        return _complain(error.message, error.code)
    except Exception as error:  # noqa: BLE001 - the last resort of a command line: a line, not a traceback
        return _complain(_defect(error), ExitCode.RUNTIME)
    return result if isinstance(result, int) else ExitCode.OK


def _discard_output() -> None:
    """What is still buffered must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: ExitCode) -> ExitCode:
    click.echo(f"carserver: {message}", err=True)
    return code


def _usage(error: click.UsageError) -> ExitCode:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return ExitCode.USAGE
    command = error.ctx.command_path if error.ctx else "carserver"
    return _complain(f"{visible(error.format_message())} (see {command} --help)", ExitCode.USAGE)


def _defect(error: Exception) -> str:
    """Where it happened, not what the exception says: its text could hold what must not be shown."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"a defect of carserver: {type(error).__name__} at {place.filename}:{place.lineno}; please report it"
