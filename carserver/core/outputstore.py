"""The outputs, as methods use them: append-only records that everyone who is authenticated shares.

But for the results of handles: those are private, and to whoever does not see one, it does not exist.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored
from carserver.core.outputs import (
    MORE,
    TOOL,
    Body,
    Fingerprint,
    Listed,
    Output,
    TakenIn,
    bytes_of,
    check_slice,
    content_of,
    inline,
    slice_of,
)
from carserver.core.principals import HOST, Principal, owned
from carserver.protocol.errors import RpcError, conflict, invalid_params, not_found, unavailable
from carserver.protocol.outputs import (
    Appended,
    FileRef,
    Final,
    Inline,
    LatestOutput,
    ListOutputs,
    OutputRecord,
    OutputSlice,
)

_DRAWS = 16  # ids drawn for one output: with a thousand million stored, one in a thousand is taken


class FileRefused(Exception):
    """A path does not lead to a plain file below the root; the message says why, and never what lies elsewhere."""


class FileChanged(Exception):
    """The file is not, or no longer, what it was; the message says how that shows."""


class Files(Protocol):
    """The files below the root. None is opened by two steps, and none is read that is not what it was."""

    async def examine(self, path: str) -> tuple[Body, Fingerprint]:
        """Reads a whole file.

        Raises:
            FileRefused, FileChanged.
            RpcError: overloaded, unavailable, deadline_exceeded.
        """
        ...

    async def read(self, path: str, fingerprint: Fingerprint, offset: int, length: int) -> bytes:
        """The bytes of the file with this fingerprint from `offset` on: `length`, or up to its end.

        It raises as `examine` does.
        """
        ...


class OutputLog(Protocol):
    """Keeps outputs. What it acknowledges is durable."""

    async def edit(self, edit: Edit, *, patient: bool = False) -> Any:
        """See `core.ports.RunLog`."""
        ...

    async def output(self, output_id: str, to: Principal) -> Output | None:
        """The output of this id; None if there is none that `to` sees."""
        ...

    async def keyed_output(self, owner: str, key: str) -> Output | None:
        """What `owner` appended with this idempotency key; None if nothing."""
        ...

    async def latest_output(self, filters: LatestOutput, to: Principal) -> Output | None:
        """The newest output that fits and that `to` sees; None if none does."""
        ...

    async def outputs(self, filters: ListOutputs, to: Principal, after: int, limit: int) -> Listed:
        """A page of the outputs that `to` sees, in order, from behind the number `after`: at most `limit`."""
        ...


class Append(Edit, frozen=True, kw_only=True):
    """`outputs.append`: `output` is what is to be stored, but for its id, which is drawn until it is new.

    The answer comes with how many outputs it stored: none, where it was sent again.
    """

    output: Output
    new_id: Callable[[], str]

    @property
    def size(self) -> int:
        content = content_of(self.output.record.event)
        value = content.value if isinstance(content, Inline) else None
        return 2048 + (len(bytes(value)) if isinstance(value, Raw) else 0) + 64 * len(self.output.record.parent_refs)

    def edit(self, stored: Stored) -> Edited:
        output, record = self.output, self.output.record
        if output.key is not None and (prior := stored.outputs.keyed(output.owner, output.key)) is not None:
            return Edited((answer_again(prior, output.key_digest), 0))
        if isinstance(record.run_id, str):
            owned(stored.runs.head(record.run_id), self.principal, "run", record.run_id)
        for parent in record.parent_refs:
            if not stored.outputs.exists(parent, self.principal):
                raise not_found("output", parent)
        added = _add(stored, output, self.new_id)
        return Edited((Appended(id=added.record.id), 1))


class KeepResult(Edit, frozen=True, kw_only=True):
    """The result of a handle as a private output of `principal`, whose handle it is. Answers with the output.

    Its run may have been deleted meanwhile: then it belongs to none, and goes as such outputs go, by age.
    """

    handle: str
    tool: str
    value: Raw
    run_id: str | None
    now_ms: int
    new_id: Callable[[], str]

    @property
    def size(self) -> int:
        return 2048 + len(bytes(self.value))

    def edit(self, stored: Stored) -> Edited:
        # It is large: what there is to do with it is done here, in the writer's thread, and not on the loop.
        content, body = inline(Raw(msgspec.json.format(bytes(self.value), indent=-1)))
        run = None if self.run_id is None else stored.runs.head(self.run_id)
        record = OutputRecord(
            id="",
            task_id=self.handle,
            attempt=0,
            producer_agent=TOOL + self.tool,
            event=Final(content=content, ok=True),
            parent_refs=[],
            created_at_ms=self.now_ms,
            run_id=run.run.id if run is not None and run.owner == self.principal.name else UNSET,
            private=True,
        )
        return Edited(_add(stored, Output(owner=self.principal.name, record=record, body=body), self.new_id))


def _add(stored: Stored, output: Output, new_id: Callable[[], str]) -> Output:
    """Stores an output under an id that is drawn until it is new."""
    for _ in range(_DRAWS):
        drawn = new_id()
        if not stored.outputs.exists(drawn, HOST):
            return stored.outputs.add(replace(output, record=replace(output.record, id=drawn)))
    raise unavailable("no id could be found for the output that is not taken")


def answer_again(prior: Output, key_digest: bytes | None) -> Appended:
    """What an append is answered whose key was used before.

    Raises:
        RpcError: conflict key_reused.
    """
    if prior.key_digest != key_digest:
        raise conflict("key_reused", "idempotency_key was used before with other params", id=prior.record.id)
    return Appended(id=prior.record.id)


class OutputStore:
    """All outputs.

    Args:
        log: Where they are kept.
        files: What references to files lead to; None: there are none.
        new_id: Draws an id, from a cryptographic source; called in the writer's thread.
        now_ms: A clock, milliseconds since 1970.
        settings: The bounds.
        counters: What is counted.
    """

    def __init__(
        self,
        log: OutputLog,
        files: Files | None,
        new_id: Callable[[], str],
        now_ms: Callable[[], int],
        settings: Settings,
        counters: Counters,
    ) -> None:
        self._log = log
        self._files = files
        self._new_id = new_id
        self._now_ms = now_ms
        self._settings = settings
        self._counters = counters

    async def append(self, output: Output, given: TakenIn, principal: Principal) -> Appended:
        """Stores `output`, whose event is `given`; the answer means that it is durable.

        Raises:
            RpcError: not_found, forbidden, conflict; invalid_params for a file; what storage raises.
        """
        if given.file is not None:
            # Before the file is looked at: what was appended stays so, whatever has become of it.
            if output.key is not None and (prior := await self._log.keyed_output(output.owner, output.key)) is not None:
                return answer_again(prior, output.key_digest)
            body, fingerprint = await self._examine(given.file, given.where)
            output = replace(output, body=body, fingerprint=fingerprint)
        edit = Append(principal=principal, output=output, new_id=self._new_id)
        appended, stored = await self._log.edit(edit)
        self._counters.outputs_appended += stored
        return cast("Appended", appended)

    async def keep_result(self, owner: Principal, handle: str, tool: str, value: Raw, run_id: str | None) -> Output:
        """Stores the result of a handle, for `owner` and the host alone; the answer means that it is durable.

        No limit of outputs holds it: how large a result may be is for whoever runs the tool to say.

        Raises:
            RpcError: overloaded, unavailable.
        """
        edit = KeepResult(
            principal=owner,
            handle=handle,
            tool=tool,
            value=value,
            run_id=run_id,
            now_ms=self._now_ms(),
            new_id=self._new_id,
        )
        output: Output = await self._log.edit(edit, patient=True)
        self._counters.outputs_appended += 1
        return output

    async def _examine(self, file: FileRef, where: str) -> tuple[Body, Fingerprint]:
        if self._files is None:
            raise invalid_params(where, "this daemon takes no files: it was started without --file-root")
        try:
            return await self._files.examine(file.path)
        except FileRefused as error:
            self._counters.files_refused += 1
            raise invalid_params(where, str(error)) from None
        except FileChanged as error:
            raise self._changed(str(error)) from None

    async def with_file(self, output: Output) -> Output:
        """One that is about to be imported: with its file's fingerprint, if the file is there and has its SHA-256.

        Raises:
            RpcError: what reading raises.
        """
        file = content_of(output.record.event)
        if self._files is None or not isinstance(file, FileRef) or not (output.body and output.body.sha256):
            return output
        if await self._log.output(output.record.id, HOST) is not None:
            return output  # it is compared with what is stored, and not stored again
        try:
            body, fingerprint = await self._files.examine(file.path)
        except (FileRefused, FileChanged):
            return output
        return replace(output, body=body, fingerprint=fingerprint) if body.sha256 == output.body.sha256 else output

    async def get(self, output_id: str, principal: Principal) -> Output:
        """The output of this id.

        Raises:
            RpcError: not_found, also where `principal` does not see it; what reading raises.
        """
        output = await self._log.output(output_id, principal)
        if output is None:
            raise not_found("output", output_id)
        return output

    async def latest(self, filters: LatestOutput, principal: Principal) -> OutputRecord:
        """The newest output of a producer, or the newest artifact of a name, of those that `principal` sees.

        Raises:
            RpcError: not_found; what reading raises.
        """
        output = await self._log.latest_output(filters, principal)
        if output is None:
            raise not_found("output", filters.name if filters.name is not None else filters.artifact or "")
        return output.record

    async def list(self, filters: ListOutputs, principal: Principal, after: int, limit: int) -> Listed:
        """A page of the outputs that `principal` sees, in order, from behind the number `after`."""
        return await self._log.outputs(filters, principal, after, limit)

    async def read(self, output_id: str, principal: Principal, offset: int, length: int) -> OutputSlice:
        """A slice of an output's content.

        Raises:
            RpcError: not_found; conflict file_changed; invalid_params; what reading raises.
        """
        output = await self.get(output_id, principal)
        content, body = content_of(output.record.event), output.body
        if content is None or body is None:
            raise invalid_params("id", f"output {output_id!r} is progress: it has no content")
        if isinstance(content, FileRef) and output.fingerprint is None:
            raise self._changed(f"{content.path!r} was not there, or was another file, when this output was imported")
        check_slice(body, offset)
        if isinstance(content, FileRef):
            window = await self._read_file(content, output.fingerprint, offset, length + MORE)
        else:
            assert isinstance(content.value, Raw)  # noqa: S101 - only a list leaves it out
            window = bytes_of(content.value)[offset : offset + length + MORE]
        return slice_of(body, offset, length, window)

    async def _read_file(self, file: FileRef, fingerprint: Fingerprint | None, offset: int, length: int) -> bytes:
        if self._files is None or fingerprint is None:
            raise unavailable("the content is a file, and this daemon was started without --file-root")
        try:
            return await self._files.read(file.path, fingerprint, offset, length)
        except (FileRefused, FileChanged) as error:
            raise self._changed(f"{file.path!r} is not the file that was appended: {error}") from None

    def _changed(self, message: str) -> RpcError:
        self._counters.files_changed += 1
        return conflict("file_changed", message)
