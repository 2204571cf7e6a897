"""Fixtures, and async tests: each on a loop of its own, under a timeout; in debug mode where it is a unit test."""

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.daemon import Daemon, running

ASYNC_TEST_S = 110.0  # below pytest's own timeout for a test, so that this one names what waited

StartDaemon = Callable[..., Daemon]

# How long an example takes is the machine's affair; pytest's timeout ends what hangs. The examples are the same each
# time, so that a change is not blamed for what another one would have met; `--hypothesis-profile=searching` has others.
settings.register_profile("searching", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("the same", settings.get_profile("searching"), derandomize=True)
settings.load_profile("the same")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def run() -> None:
        async with asyncio.timeout(ASYNC_TEST_S):
            await pyfuncitem.obj(**arguments)

    asyncio.run(run(), debug="unit" in Path(pyfuncitem.path).parts)
    return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts daemons, `start(*args, name="state", wrapper=(), **settings)`; each must end well when the test does."""
    with contextlib.ExitStack() as stack:

        def start_one(*args: str, name: str = "state", wrapper: Sequence[str] = (), **settings: object) -> Daemon:
            return stack.enter_context(running(tmp_path / name, *args, wrapper=wrapper, **settings))

        yield start_one


@pytest.fixture
def daemon(start: StartDaemon) -> Daemon:
    """A daemon with default settings."""
    return start()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a file root, beside its state folder."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "root").mkdir()
    with running(folder / "state", "--file-root", str(folder / "root")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def root(served: Daemon) -> Path:
    """The file root."""
    return served.state.with_name("root")
