"""The OpenRPC document and docs/protocol.md come from the method table, and are not stale."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from carserver.rpc.method import Method
from tests.daemon import Daemon
from tests.openrpc import validate
from tests.peer import peer
from tests.reference import PAGE, described, page, section, sections_of, table

METHODS = [pytest.param(entry, id=" ".join(filter(None, key[::-1]))) for key, entry in table().all().items()]
STALE = "docs/protocol.md is stale: run scripts/docs"


@pytest.mark.parametrize("entry", METHODS)
async def test_a_methods_section_is_what_its_example_and_the_table_give_today(entry: Method, tmp_path: Path) -> None:
    assert sections_of(PAGE.read_text()).get((entry.name, entry.dialect)) == await section(entry, tmp_path / "state"), (
        STALE
    )


def test_the_rest_of_the_page_is_what_the_table_gives_today() -> None:
    text = PAGE.read_text()
    assert page(described(), defaultdict(str, sections_of(text))) == text, STALE


async def test_discover_validates_against_openrpcs_own_schema_and_is_the_same_over_http(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        document = await caller.call("rpc.discover")
    validate(document)
    assert json.loads(await asyncio.to_thread(daemon.get, "/openrpc.json")) == document
    methods = table().all()
    assert [method["name"] for method in document["methods"]] == [name for name, dialect in methods if not dialect]
    assert [method["name"] for method in document["x-car"]] == [name for name, dialect in methods if dialect]


@pytest.mark.parametrize("entry", METHODS)
def test_every_method_that_takes_params_has_an_example_with_params(entry: Method) -> None:
    assert (entry.params is not None) == (entry.example.params is not msgspec.UNSET)


@pytest.mark.parametrize("entry", METHODS)
def test_what_a_method_gets_of_a_short_request_is_of_its_declared_type_and_the_same(entry: Method) -> None:
    params = {} if entry.example.params is msgspec.UNSET else entry.example.params
    try:
        short = entry.short_arguments(msgspec.Raw(json.dumps(params).encode()))
    except msgspec.DecodeError:
        assert entry.fields is None, "only what takes an array has no short way"
        return
    long = entry.arguments(params, json.dumps({"params": params}).encode())
    assert type(short) is type(long)
    assert short == long
