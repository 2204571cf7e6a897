"""For code that is there already: what it logs, and calls of its functions, as events of the current run.

Nothing is dropped here. Where the run's buffer is full, a thread waits for room as `Run.record_from_thread` does; on
the loop's own thread, which must not wait, the logging call or the decorated function raises BufferFull.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import Signature, isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature
from reprlib import Repr
from secrets import token_hex
from typing import Any, Final, ParamSpec, TypeVar, cast, overload

import msgspec

from carserver.client.current import current_run
from carserver.client.errors import ClientError, RunOver
from carserver.client.run import Run, told

VALUE_CHARACTERS: Final = 4_000  # of the arguments of a call, or of its result
_OWN: Final = "carserver"  # the name that all loggers of this package begin with

P = ParamSpec("P")
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_short = Repr()
_short.maxstring = _short.maxother = 1_000
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 50


class LoggingHandler(logging.Handler):
    """Records `logging`'s records as events: `log {level, logger, message, at_ms}`, and `error` where there is one.

        logging.getLogger().addHandler(LoggingHandler())

    They go to the current run, and nowhere where there is none. A thread that was not begun with the block's context
    (`asyncio.to_thread` is) has none: give it a handler with `run`. What carserver's client logs itself is left out.
    An exception is told as `Type: message`, without its traceback. Raises what `Run.record` does, but for NotRecorded:
    where nothing is recorded any more, the run's end says how many events that was.

    Args:
        run: whose events they are to be; None: the current run's.
        level: the lowest that is recorded.
    """

    def __init__(self, run: Run | None = None, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self._run = run

    def handle(self, record: logging.LogRecord) -> bool:
        """As `Handler.handle`, but without its lock: who waits for room holds up nobody else, least of all the loop."""
        passed: bool | logging.LogRecord = self.filter(record)
        if passed:
            # From Python 3.12 on a filter may put another record, one without secrets, in the place of this.
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Records it."""
        run = current_run() if self._run is None else self._run
        if run is None or record.name.partition(".")[0] == _OWN:
            return
        try:
            message = self.format(record) if self.formatter is not None else record.getMessage()
        except Exception:  # noqa: BLE001 - as logging itself: a wrong format is told, and ends nothing
            self.handleError(record)
            return
        event: dict[str, Any] = {
            "type": "log",
            "level": record.levelname,
            "logger": _clean(record.name),
            "message": _clean(message),
            "at_ms": int(record.created * 1000),
        }
        if record.exc_info and record.exc_info[1] is not None:
            event["error"] = told(record.exc_info[1])
        _record(run, event)


def _record(run: Run, event: dict[str, Any]) -> None:
    """From wherever the caller is, as the policy allows there. What comes after the block is no part of its run."""
    with suppress(RunOver):
        recorder = run.recorder
        if recorder.broken:
            recorder.miss(1)
        elif recorder.on_loop:
            run.record_nowait(event)
        else:
            run.record_from_thread(event)


@overload
def recorded(function: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def recorded(
    *, name: str | None = None, arguments: bool = True, result: bool = True
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
def recorded(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    arguments: bool = True,
    result: bool = True,
) -> Any:
    """Records the calls of a function or coroutine as `tool_start {id, name, args}` and `tool_end {id, name, output}`.

    Without a current run it is called as if it were not decorated. What it raises is recorded as `error`, in the form
    `Type: message`, and goes on. Values are told as JSON, or in words where they are none, and one that is longer than
    4,000 characters is cut and says so.

    Args:
        function: what is decorated.
        name: of the tool; None: the function's.
        arguments: whether they are recorded; not where there are secrets among them.
        result: whether what it returns is; likewise.

    Raises:
        TypeError: it is a generator, whose call is not over when it returns.
    """
    if function is None:
        return lambda decorated: recorded_as(decorated, name, arguments=arguments, result=result)
    return recorded_as(function, name, arguments=arguments, result=result)


def recorded_as(function: Callable[P, T], name: str | None, *, arguments: bool, result: bool) -> Callable[P, T]:
    """What `recorded` makes of a function."""
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise TypeError(f"{function.__qualname__} is a generator: @recorded takes functions and coroutines")
    call = _Calls(name or str(getattr(function, "__name__", type(function).__name__)), signature(function))

    def begin(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        return call.start(args, kwargs) if arguments else call.start((), {})

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        run = current_run()
        if run is None:
            return function(*args, **kwargs)
        start = begin(*args, **kwargs)
        _record(run, start)
        try:
            value = function(*args, **kwargs)
        except BaseException as error:
            _end_badly(run, start, error)
            raise
        _record(run, call.end(start, value if result else None))
        return value

    @wraps(function)
    async def waiting(*args: P.args, **kwargs: P.kwargs) -> Any:
        run = current_run()
        if run is None:
            return await cast("Any", function(*args, **kwargs))
        start = begin(*args, **kwargs)
        await run.record(start)
        try:
            value = await cast("Any", function(*args, **kwargs))
        except BaseException as error:
            _end_badly(run, start, error)
            raise
        with suppress(RunOver):
            await run.record(call.end(start, value if result else None))
        return value

    return cast("Callable[P, T]", waiting) if iscoroutinefunction(function) else plain


class _Calls:
    """The events of one function's calls, in the words that agents have for tools, which the live view shows."""

    def __init__(self, name: str, known: Signature) -> None:
        self._name = name
        self._signature = known

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        event: dict[str, Any] = {"type": "tool_start", "id": f"call-{token_hex(8)}", "name": self._name}
        if args or kwargs:
            event["args"] = self._args(args, kwargs)
        return event

    def end(self, start: dict[str, Any], value: Any) -> dict[str, Any]:
        output = "" if value is None else value if isinstance(value, str) else _told(value)
        return {"type": "tool_end", "id": start["id"], "name": self._name, "output": _cut(_clean(output))}

    def _args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By their names; as JSON where all of them are that, and in words where they are not."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:  # the call is about to fail with it
            return {"arguments": _cut(_told([args, kwargs]))}
        given = {name: value for name, value in bound.arguments.items() if name not in {"self", "cls"}}
        try:
            if len(raw := _encode(given)) <= VALUE_CHARACTERS:
                return msgspec.Raw(raw)
        except (TypeError, ValueError, OverflowError, RecursionError):
            pass
        return {name: value if _is_short(value) else _cut(_told(value)) for name, value in given.items()}


def _end_badly(run: Run, start: dict[str, Any], error: BaseException) -> None:
    """What ends a call is not replaced by trouble with recording it; that is told beside it."""
    event = {"type": "tool_end", "id": start["id"], "name": start["name"], "output": "", "error": _cut(told(error))}
    try:
        _record(run, event)
    except ClientError as trouble:
        error.add_note(f"the end of {start['name']} was not recorded: {trouble}")


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**53)


def _told(value: Any) -> str:
    """As JSON, or else as `repr` has it, in short."""
    try:
        return _encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass
    try:
        return _clean(_short.repr(value))
    except Exception:  # noqa: BLE001 - a value that cannot be shown ends no call
        return f"({type(value).__name__})"


def _cut(text: str) -> str:
    if len(text) <= VALUE_CHARACTERS:
        return text
    return f"{text[:VALUE_CHARACTERS]}… (cut: {len(text)} characters in all)"


def _clean(text: str) -> str:
    """Without lone surrogates, which names of files may bring along."""
    return text.encode("utf-8", "replace").decode()
