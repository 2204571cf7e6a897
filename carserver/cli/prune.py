"""`carserver prune`: delete runs that are over, by age, number and size; shown first, then done."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import click

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import counted, data, json_data, note
from carserver.cli.plain import visible
from carserver.protocol.pruning import Pruned

_MOST = 2**53  # the daemon's own bound
_SECOND = 1_000  # milliseconds
_AGES = {"s": _SECOND, "m": 60 * _SECOND, "h": 3_600 * _SECOND, "d": 86_400 * _SECOND, "w": 7 * 86_400 * _SECOND}
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Amount(click.ParamType[int]):
    """A number with a unit.

    Args:
        name: What it is an amount of.
        pattern: The number and the unit, as groups.
        units: What each unit is worth.
        examples: For who writes something else.
    """

    def __init__(self, name: str, pattern: str, units: Mapping[str, int], examples: str) -> None:
        self.name = name
        self._pattern = re.compile(pattern)
        self._units = units
        self._examples = examples

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        found = self._pattern.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is no {self.name}: write {self._examples}", param, ctx)
        number, unit = found.groups()
        amount = round(float(number) * self._units[unit.upper() if unit.upper() in self._units else unit])
        if amount > _MOST:
            self.fail(f"{value!r} is more than the daemon takes ({_MOST})", param, ctx)
        return amount


_AGE = Amount("duration", r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])", _AGES, "90s, 15m, 12h, 30d or 8w")
_SIZE = Amount("size", r"(?i:(\d{1,12}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?)", _SIZES, "500M, 10G or a number of bytes")


@click.command("prune")
@click.option("--older-than", type=_AGE, metavar="AGE", help="Runs that ended longer ago than that: 30d, 12h.")
@click.option("--max-runs", type=click.IntRange(min=0, max=_MOST), metavar="N", help="As many as are more than N.")
@click.option("--max-bytes", type=_SIZE, metavar="SIZE", help="As many as take more than that: 10G.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="The daemon's answer.")
@daemon_options
def prune(
    *,
    older_than: int | None,
    max_runs: int | None,
    max_bytes: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    state_dir: str | None,
    url: str | None,
) -> None:
    """Delete runs that are over, with their outputs.

    Those that ended first go first; live runs stay. At a terminal it shows what would go, and asks. --older-than
    deletes outputs without a run, too.
    """
    given = {"older_than_ms": older_than, "max_runs": max_runs, "max_bytes": max_bytes}
    params = {name: value for name, value in given.items() if value is not None}
    if not params:
        raise CommandError("say what goes: --older-than, --max-runs or --max-bytes", ExitCode.USAGE)
    asks = not dry_run and not yes
    if asks and not _somebody_there():
        raise CommandError("nobody can be asked here: say --yes, or look first with --dry-run", ExitCode.USAGE)
    daemon = Daemon(state_dir, url)
    if asks:
        would = _prune(daemon, {**params, "dry_run": True})[0]
        note(_told(would))
        if not would.runs and not would.outputs:
            return
        click.confirm("Delete them?", abort=True, err=True)
    pruned, raw = _prune(daemon, {**params, "dry_run": dry_run})
    if as_json:
        json_data(raw)
        return
    for run_id in pruned.run_ids:
        data(visible(run_id))
    if pruned.more_runs:
        note(f"and {pruned.more_runs} more, whose ids are not shown")
    note(_told(pruned))


def _somebody_there() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _prune(daemon: Daemon, params: dict[str, Any]) -> tuple[Pruned, bytes]:
    import msgspec  # noqa: PLC0415 - with what follows

    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    open_connection = daemon.opener("host", notifications=0)

    async def conversation() -> msgspec.Raw:
        async with open_connection() as connection:
            # It takes as long as there is something to delete; a daemon that is gone shows by its pongs.
            return await connection.call("server.prune", params, result_type=msgspec.Raw)

    raw = bytes(talk(conversation()))
    return msgspec.json.decode(raw, type=Pruned), raw


def _told(pruned: Pruned) -> str:
    """The counts, for a person."""
    verb = "would be deleted" if pruned.dry_run else "deleted"
    words = (
        f"{counted(pruned.runs, 'run')} and {counted(pruned.outputs, 'output')} {verb}, {counted(pruned.bytes, 'byte')}"
    )
    if pruned.damaged_runs:
        words += f"; damaged, and stay: {counted(pruned.damaged_runs, 'run')}"
    return words
