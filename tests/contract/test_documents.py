"""What README and the guide tell to do, does what they say; and the site has every page."""

import asyncio
import logging
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import DEFECTS, ROOT
from tests.documents import Reader, blocks

DOCUMENTS = ("README.md", "docs/guide.md")
LANGUAGES = {"sh", "python", "text"}

# Blocks that no test runs, by their first line, which says why.
EXCEPTIONS = {
    ("README.md", "# needs the network, the first time"),
    ("README.md", "# needs docker"),
    ("docs/guide.md", "# needs the network"),
}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Somebody with a home of their own; what is typed at a prompt has it, too."""
    reader = Reader(tmp_path, os.environ)
    for name in set(os.environ) - set(reader.environment):
        monkeypatch.delenv(name)
    for name, value in reader.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(reader.folder)
    handlers = list(logging.getLogger().handlers)
    try:
        yield reader
        assert reader.daemon.process is not None
        figures = reader.daemon.metrics()
        assert {name: figures[name] for name in DEFECTS} == dict.fromkeys(DEFECTS, 0), reader.daemon.log
        assert reader.daemon.terminate() == 0, reader.daemon.log
    finally:
        logging.getLogger().handlers[:] = handlers
        if reader.daemon.process is not None:
            reader.daemon.kill()


@pytest.mark.parametrize("document", DOCUMENTS)
async def test_every_block_does_what_the_document_says(document: str, reader: Reader) -> None:
    await reader.serve()
    for block in blocks(document):
        if block.needs is None:
            try:
                await reader.read(block)
            except BaseException as error:
                error.add_note(f"in the block at {block}")
                raise


def test_the_blocks_that_are_not_run_are_those_that_say_why() -> None:
    found = [(block.document, block.needs) for name in DOCUMENTS for block in blocks(name) if block.needs]
    assert len(found) == len(EXCEPTIONS)
    assert set(found) == EXCEPTIONS


@pytest.mark.parametrize("document", DOCUMENTS)
async def test_every_block_has_a_language_that_is_run(document: str) -> None:
    found = blocks(document)
    assert {block.language for block in found} <= LANGUAGES
    fences = [line for line in (ROOT / document).read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(found)  # none is written in a way that is not found
    for block in found:
        if block.language == "sh":
            await asyncio.to_thread(subprocess.run, ["bash", "-n", "-c", block.text], check=True)


def test_the_sites_navigation_names_every_page() -> None:
    with (ROOT / "zensical.toml").open("rb") as file:
        named = list(leaves(tomllib.load(file)["project"]["nav"]))
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == pages | {"README.md", "CHANGELOG.md", "examples/README.md"}


def leaves(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for inner in part.values() if isinstance(part, dict) else part:
            yield from leaves(inner)
