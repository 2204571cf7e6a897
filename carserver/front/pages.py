"""The four pages of plain HTTP: `/healthz`, `/readyz`, `/metrics`, `/openrpc.json` (contract, section 9)."""

from collections.abc import Callable

from carserver.front.handshake import PLAIN_TEXT, http_answer

JSON = "application/json"


class Pages:
    """Answers them.

    Args:
        problem: Why the daemon takes no work; None while it does.
        metrics: The figures, in the text format of Prometheus, and its content type.
        openrpc: The document, as JSON.
    """

    def __init__(
        self,
        problem: Callable[[], str | None],
        metrics: Callable[[], tuple[bytes, str]],
        openrpc: Callable[[], bytes],
    ) -> None:
        self._problem = problem
        self._metrics = metrics
        self._openrpc = openrpc

    def answer(self, path: str) -> bytes:
        """The HTTP answer at a path of `handshake.PAGES`."""
        if path == "/metrics":
            body, content_type = self._metrics()
            return http_answer(200, body, content_type)
        if path == "/openrpc.json":
            return http_answer(200, self._openrpc(), JSON)
        if path == "/readyz" and (problem := self._problem()) is not None:
            return http_answer(503, f"not ready: {problem}\n".encode(), PLAIN_TEXT)
        return http_answer(200, b"ok\n", PLAIN_TEXT)
