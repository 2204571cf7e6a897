"""The outputs, as methods use them: append-only records that everyone who is authenticated shares."""

from collections.abc import Callable
from typing import Any, Protocol, cast

from msgspec import Raw
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored
from carserver.core.outputs import (
    MORE,
    Body,
    Fingerprint,
    Listed,
    Output,
    TakenIn,
    bytes_of,
    check_slice,
    content_of,
    slice_of,
)
from carserver.core.principals import Principal, owned
from carserver.protocol.errors import RpcError, conflict, invalid_params, not_found, unavailable
from carserver.protocol.outputs import Appended, FileRef, Inline, LatestOutput, ListOutputs, OutputRecord, OutputSlice

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

    async def edit(self, edit: Edit) -> Any:
        """See `core.ports.RunLog`."""
        ...

    async def output(self, output_id: str) -> Output | None:
        """The output of this id; None if there is none."""
        ...

    async def keyed_output(self, owner: str, key: str) -> Output | None:
        """What `owner` appended with this idempotency key; None if nothing."""
        ...

    async def latest_output(self, filters: LatestOutput) -> Output | None:
        """The newest output that fits; None if none does."""
        ...

    async def outputs(self, filters: ListOutputs, after: int, limit: int) -> Listed:
        """A page of outputs, in order, from behind the number `after`: at most `limit`."""
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
            if not stored.outputs.exists(parent):
                raise not_found("output", parent)
        for _ in range(_DRAWS):
            drawn = self.new_id()
            if not stored.outputs.exists(drawn):
                stored.outputs.add(replace(output, record=replace(record, id=drawn)))
                return Edited((Appended(id=drawn), 1))
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
        settings: The bounds.
        counters: What is counted.
    """

    def __init__(
        self, log: OutputLog, files: Files | None, new_id: Callable[[], str], settings: Settings, counters: Counters
    ) -> None:
        self._log = log
        self._files = files
        self._new_id = new_id
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
        if await self._log.output(output.record.id) is not None:
            return output  # it is compared with what is stored, and not stored again
        try:
            body, fingerprint = await self._files.examine(file.path)
        except (FileRefused, FileChanged):
            return output
        return replace(output, body=body, fingerprint=fingerprint) if body.sha256 == output.body.sha256 else output

    async def get(self, output_id: str) -> Output:
        """The output of this id.

        Raises:
            RpcError: not_found; what reading raises.
        """
        output = await self._log.output(output_id)
        if output is None:
            raise not_found("output", output_id)
        return output

    async def latest(self, filters: LatestOutput) -> OutputRecord:
        """The newest output of a producer, or the newest artifact of a name.

        Raises:
            RpcError: not_found; what reading raises.
        """
        output = await self._log.latest_output(filters)
        if output is None:
            raise not_found("output", filters.name if filters.name is not None else filters.artifact or "")
        return output.record

    async def list(self, filters: ListOutputs, after: int, limit: int) -> Listed:
        """A page of outputs, in order, from behind the number `after`."""
        return await self._log.outputs(filters, after, limit)

    async def read(self, output_id: str, offset: int, length: int) -> OutputSlice:
        """A slice of an output's content.

        Raises:
            RpcError: not_found; conflict file_changed; invalid_params; what reading raises.
        """
        output = await self.get(output_id)
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
