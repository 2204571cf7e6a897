"""Runs a folder's tests with pytest, and tells of it in chunks, a line each: what `output = "jsonl"` reads.

The tool `tests` of tools.toml. A chunk is text, data or progress; `done` or `error` is the last one.
"""

import json
import os
import sys
from typing import Any

import pytest


class Reporter:
    """A plugin of pytest that writes chunks."""

    def __init__(self) -> None:
        # Standard output is the daemon's: what pytest and the tests print must not come between the chunks.
        self._chunks = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._total = self._over = 0
        self.figures = {"passed": 0, "failed": 0, "skipped": 0}

    def write(self, kind: str, **members: Any) -> None:
        """One chunk."""
        self._chunks.write(json.dumps({"kind": kind, **members}) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many there are is known."""
        self._total = len(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read is a failure."""
        if report.failed:
            self._failed(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is set up, called and torn down; each can fail, and one of them is what it came to."""
        if report.failed:
            self._failed(report)
        elif report.skipped or report.when == "call":
            self.figures["skipped" if report.skipped else "passed"] += 1
        if report.when == "teardown":
            self._over += 1
            self.write("progress", fraction=self._over / self._total, message=f"{self._over} of {self._total} tests")

    def _failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.figures["failed"] += 1
        self.write("text", text=f"{report.nodeid} failed:\n{report.longreprtext}\n\n")


def main() -> None:
    """Runs the tests of the folder that is named."""
    reporter = Reporter()
    code = pytest.main(["-p", "no:cacheprovider", "--", sys.argv[1]], plugins=[reporter])
    if code == pytest.ExitCode.OK:
        reporter.write("done", result=reporter.figures)
        return
    reporter.write("data", data=reporter.figures)
    if code == pytest.ExitCode.TESTS_FAILED:
        reporter.write("error", message=f"{reporter.figures['failed']} failed")
    else:
        reporter.write("error", message=f"pytest could not run them: {pytest.ExitCode(code).name}")


if __name__ == "__main__":
    main()
