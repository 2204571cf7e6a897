"""docs/operating.md speaks of what there is: settings, figures, variables, commands."""

import re
from pathlib import Path

import click

from carserver.cli.app import cli
from carserver.cli.settings import CLIENT_VARIABLES, PREFIX
from carserver.config import Settings
from tests.conftest import StartDaemon
from tests.daemon import ROOT, Daemon
from tests.documents import blocks
from tests.peer import peer
from tests.settings_table import PAGE, with_table

FILES = [PAGE, ROOT / "Dockerfile", ROOT / "docs/systemd/carserver.service"]


def found(pattern: str, *files: Path) -> set[str]:
    return {name for file in files for name in re.findall(pattern, file.read_text(), re.DOTALL | re.MULTILINE)}


def test_the_table_of_settings_is_what_config_py_has_today() -> None:
    assert with_table(PAGE.read_text()) == PAGE.read_text(), "docs/operating.md is stale: run scripts/docs"


def test_every_figure_that_an_operator_is_told_of_is_at_metrics(daemon: Daemon) -> None:
    served = set(re.findall(r"^([a-z_]+) ", daemon.get("/metrics"), re.MULTILINE))
    told = found(r"\b((?:carserver|process)_[a-z_]+)\b", PAGE)
    assert len(told) > 20
    assert told <= served


def test_every_variable_that_is_named_is_read() -> None:
    read = {PREFIX + name.upper() for name in Settings.__struct_fields__} | CLIENT_VARIABLES
    assert found(rf"\b({PREFIX}[A-Z_]+)\b", *FILES) <= read


def test_every_command_that_is_named_is_there() -> None:
    code = "\n".join(found(r"(```.*?```|`[^`\n]+`)", PAGE))
    told = set(re.findall(r"\b(?=carserver ([a-z]+)\b)", code)) - {"carserver"}
    assert len(told) > 5
    assert told <= set(cli.list_commands(click.Context(cli)))


async def test_the_method_that_is_shown_is_served(start: StartDaemon, tmp_path: Path) -> None:
    (module,) = [block.text for block in blocks("docs/operating.md") if "@method" in block.text]
    (tmp_path / "greeting.py").write_text(module)
    daemon = start("--methods", "greeting", wrapper=("env", "-C", str(tmp_path)))
    async with peer(daemon) as caller:
        assert await caller.call("demo.greet", {"name": "Ada"}) == "Hello Ada, from client"
        names = [entry["name"] for entry in (await caller.call("rpc.discover"))["methods"]]
    assert "demo.greet" in names
