"""`outputs.*`: records that programs pass around by a short reference (contract, section 8)."""

import hashlib
from typing import Annotated

import msgspec
import orjson

from carserver.core.outputs import Output, TakenIn, check_producer, take_in
from carserver.protocol.codec import check_name, encode
from carserver.protocol.errors import ErrorKind, invalid_params, limit_exceeded
from carserver.protocol.outputs import (
    Appended,
    AppendOutput,
    LatestOutput,
    ListOutputs,
    OutputPage,
    OutputRecord,
    OutputRef,
    OutputSlice,
    ReadOutput,
)
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

NOT_FOUND, CONFLICT, FORBIDDEN = ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.FORBIDDEN

EXAMPLE_ID = "out-3f9c0a61d2"
"""Stands in examples for the id that the append before was answered."""
_CONTENT = {"kind": "inline", "value": "All 214 tests pass."}
_APPEND = (
    "outputs.append",
    {
        "task_id": "fix-the-tests",
        "attempt": 1,
        "producer_agent": "coder",
        "event": {"type": "artifact", "name": "report", "content": _CONTENT},
        "parent_refs": [],
    },
)


@method("outputs.append", errors=[NOT_FOUND, FORBIDDEN, CONFLICT], example=Example(_APPEND[1]))
async def append(session: Session, params: AppendOutput) -> Appended:
    """Stores an output, for everyone who is authenticated to read; the answer means that it is durable.

    `parent_refs` must exist, and be visible; `run_id` is a run of one's own, which the output is deleted with. The same
    `idempotency_key` with the same other params gives the same id, with others a `conflict` (`key_reused`).

    A file is named by its path below the daemon's file root. It is a plain file, no part of its path is a link, and it
    has no other name. All of it is read now, so append it when it is complete; if it changes meanwhile, that is a
    `conflict` (`file_changed`).
    """
    settings = session.services.settings
    given = take_in(params.event, settings)
    parents = params.parent_refs or []
    if len(parents) > settings.output_parents:
        raise limit_exceeded("output_parents", len(parents), settings.output_parents, "parent_refs")
    for place, parent in enumerate(parents):
        check_name(parent, settings.name_chars, f"parent_refs[{place}]")
    record = OutputRecord(
        id="",
        task_id=params.task_id,
        attempt=params.attempt,
        producer_agent=params.producer_agent,
        event=given.event,
        parent_refs=parents,
        created_at_ms=session.services.clock.now_ms(),
        run_id=msgspec.UNSET if params.run_id is None else params.run_id,
    )
    key = params.idempotency_key
    output = Output(
        owner=session.acting.name,
        record=record,
        body=given.body,
        key=key,
        key_digest=None if key is None else _digest(params, given),
    )
    return await session.services.outputs.append(output, given, session.acting)


def _digest(params: AppendOutput, given: TakenIn) -> bytes:
    """Of what a caller said of an output; what it means the same is the same, however it was spaced and ordered."""
    said = [params.task_id, params.attempt, params.producer_agent, params.parent_refs or [], params.run_id]
    event = orjson.loads(encode(given.event))
    return hashlib.sha256(orjson.dumps([*said, event], option=orjson.OPT_SORT_KEYS)).digest()


@method(
    "outputs.get", again=True, pages=True, errors=[NOT_FOUND], example=Example({"id": EXAMPLE_ID}, before=[_APPEND])
)
async def get(session: Session, params: OutputRef) -> OutputRecord:
    """The whole record of an output; the content of a file is for `outputs.read`.

    The result of a handle is its owner's and the host's alone (`private`): for all others, of no method, there is none.
    """
    return (await session.services.outputs.get(params.id, session.acting)).record


@method(
    "outputs.latest",
    again=True,
    pages=True,
    errors=[NOT_FOUND],
    example=Example({"artifact": "report"}, before=[_APPEND]),
)
async def latest(session: Session, params: LatestOutput) -> OutputRecord:
    """The newest output of the producer `name`, or the newest artifact of the name `artifact`: one of the two.

    Of all tasks, or of the task `task_id`, or of one `attempt` of it.
    """
    if (params.name is None) == (params.artifact is None):
        raise invalid_params("name", "`name`, a producer, or `artifact` is wanted: one of them")
    _check_attempt(params)
    if params.name is not None:
        check_producer(params.name, session.services.settings, "name")
    return await session.services.outputs.latest(params, session.acting)


@method(
    "outputs.list",
    again=True,
    pages=True,
    example=Example({"task_id": "fix-the-tests", "attempt": 1, "limit": 10}, before=[_APPEND]),
)
async def list_(session: Session, params: ListOutputs) -> Encoded[OutputPage]:
    """The outputs of one attempt of a task, in the order of their appending; of all attempts, or of all tasks.

    At most `limit` (1,000) or 1 MiB. An inline value above 4 KiB comes as `omitted: true` and its `size`. `next_page`
    asks for the next page; it carries the filters, so it is sent alone, or with the same ones.
    """
    settings = session.services.settings
    filters, after = (params, 0) if params.page is None else _read_page(params)
    _check_attempt(filters)
    limit = settings.page_entries if params.limit is None else params.limit
    if limit > settings.page_entries:
        raise limit_exceeded("page_entries", limit, settings.page_entries, "limit")
    found = await session.services.outputs.list(filters, session.acting, after, limit)
    next_page = encode(_write_page(filters, found.last)) if found.more else b"null"
    return Encoded(b'{"outputs":[%b],"next_page":%b}' % (b",".join(found.records), next_page))


def _check_attempt(filters: LatestOutput | ListOutputs) -> None:
    if filters.attempt is not None and filters.task_id is None:
        raise invalid_params("attempt", "attempts are counted within a task: name its task_id, too")


class _Page(msgspec.Struct, frozen=True):
    """What `page` holds: the number that the list goes on behind, and its filters."""

    after: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    filters: ListOutputs


_page_decoder = msgspec.json.Decoder(_Page)


def _write_page(filters: ListOutputs, last: int) -> str:
    return encode(_Page(last, msgspec.structs.replace(filters, limit=None, page=None))).hex()


def _read_page(params: ListOutputs) -> tuple[ListOutputs, int]:
    try:
        page = _page_decoder.decode(bytes.fromhex(params.page or ""))
    except (ValueError, RecursionError):  # what msgspec raises is a ValueError too, but for brackets without end
        raise invalid_params("page", "not a next_page of this daemon") from None
    given = msgspec.structs.replace(params, limit=None, page=None)
    if given not in (ListOutputs(), page.filters):
        raise invalid_params("page", "it carries the filters: send it alone, or with the same ones")
    return page.filters, page.after


@method(
    "outputs.read",
    again=True,
    pages=True,
    errors=[NOT_FOUND, CONFLICT],
    example=Example({"id": EXAMPLE_ID, "offset": 4, "length": 3}, before=[_APPEND]),
)
async def read(session: Session, params: ReadOutput) -> OutputSlice:
    """A slice of an output's content: the string itself, the compact JSON of another value, or the file.

    `offset` and `length` (at most 1 MiB, which is the default) are bytes, `size` and `sha256` those of the whole. What
    is UTF-8 as a whole is sliced at the boundaries of characters, at least one; everything else comes as base64. A file
    that is not what it was when it was appended is a `conflict` (`file_changed`).
    """
    maximum = session.services.settings.output_slice_bytes
    length = maximum if params.length is None else params.length
    if length > maximum:
        raise limit_exceeded("output_slice_bytes", length, maximum, "length")
    return await session.services.outputs.read(params.id, session.acting, params.offset, length)
