"""`outputs.*` of the daemon, typed: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""
# ruff: noqa: A002 - params have the names that they have on the wire

from collections.abc import Sequence
from typing import Any

from carserver.client.calls import Calls, given
from carserver.protocol.outputs import (
    Appended,
    GivenArtifact,
    GivenFinal,
    GivenPartial,
    OutputPage,
    OutputRecord,
    OutputSlice,
    Progress,
)


class Outputs:
    """`outputs.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def append(
        self,
        task_id: str,
        attempt: int,
        producer_agent: str,
        event: GivenArtifact | GivenFinal | GivenPartial | Progress | dict[str, Any],
        *,
        parent_refs: Sequence[str] | None = None,
        run_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Appended:
        """Stores an output, for everyone who is authenticated to read; the answer means that it is durable.

        `parent_refs` must exist, and be visible; `run_id` is a run of one's own, which the output is deleted with. The
        same `idempotency_key` with the same other params gives the same id, with others a `conflict` (`key_reused`).

        A file is named by its path below the daemon's file root. It is a plain file, no part of its path is a link, and
        it has no other name. All of it is read now, so append it when it is complete; if it changes meanwhile, that is
        a `conflict` (`file_changed`).

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Appended = await self._calls.call(
            "outputs.append",
            given(
                {"task_id": task_id, "attempt": attempt, "producer_agent": producer_agent, "event": event},
                parent_refs=parent_refs,
                run_id=run_id,
                idempotency_key=idempotency_key,
            ),
            result_type=Appended,
            again=idempotency_key is not None,
        )
        return answer

    async def get(self, id: str) -> OutputRecord:
        """The whole record of an output; the content of a file is for `outputs.read`.

        The result of a handle is its owner's and the host's alone (`private`): for all others, of no method, there is
        none.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: OutputRecord = await self._calls.call("outputs.get", {"id": id}, result_type=OutputRecord, again=True)
        return answer

    async def latest(
        self,
        *,
        name: str | None = None,
        artifact: str | None = None,
        task_id: str | None = None,
        attempt: int | None = None,
    ) -> OutputRecord:
        """The newest output of the producer `name`, or the newest artifact of the name `artifact`: one of the two.

        Of all tasks, or of the task `task_id`, or of one `attempt` of it.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: OutputRecord = await self._calls.call(
            "outputs.latest",
            given({}, name=name, artifact=artifact, task_id=task_id, attempt=attempt),
            result_type=OutputRecord,
            again=True,
        )
        return answer

    async def list(
        self,
        *,
        task_id: str | None = None,
        attempt: int | None = None,
        limit: int | None = None,
        page: str | None = None,
    ) -> OutputPage:
        """The outputs of one attempt of a task, in the order of their appending; of all attempts, or of all tasks.

        At most `limit` (1,000) or 1 MiB. An inline value above 4 KiB comes as `omitted: true` and its `size`.
        `next_page` asks for the next page; it carries the filters, so it is sent alone, or with the same ones.
        """
        answer: OutputPage = await self._calls.call(
            "outputs.list",
            given({}, task_id=task_id, attempt=attempt, limit=limit, page=page),
            result_type=OutputPage,
            again=True,
        )
        return answer

    async def read(self, id: str, *, offset: int = 0, length: int | None = None) -> OutputSlice:
        """A slice of an output's content: the string itself, the compact JSON of another value, or the file.

        `offset` and `length` (at most 1 MiB, which is the default) are bytes, `size` and `sha256` those of the whole.
        What is UTF-8 as a whole is sliced at the boundaries of characters, at least one; everything else comes as
        base64. A file that is not what it was when it was appended is a `conflict` (`file_changed`).

        Raises:
            CallError: `conflict`, `not_found`, and what any call may raise.
        """
        answer: OutputSlice = await self._calls.call(
            "outputs.read", given({"id": id, "offset": offset}, length=length), result_type=OutputSlice, again=True
        )
        return answer
