"""A method is one decorated function; table, role check, documents and clients come from its declaration.

`@method(name, …)` on `[async] def f(session, params: P) -> R` with a docstring. P is a `msgspec.Struct` (given by name
or by place) or a list type (the params array itself); it is left out where a method takes none.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import orjson
from msgspec import Raw, Struct

from carserver.protocol import codec
from carserver.protocol.errors import ErrorKind, invalid_params, overloaded
from carserver.protocol.frames import Params, raw_list_decoder, raw_params
from carserver.protocol.runs import IS_NAME
from carserver.rpc import eager

T = TypeVar("T")
Role = Literal["anyone", "authenticated", "host"]


class Encoded(Generic[T]):
    """A result of type T that is JSON already."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class Replied(Generic[T]):
    """A result, and what is to happen when its reply is queued (in a batch: when the batch's is).

    `then` is told whether the reply says so; False: it was too large, and refused instead.
    """

    __slots__ = ("result", "then")

    def __init__(self, result: T, then: Callable[[bool], None]) -> None:
        self.result = result
        self.then = then


class Example(Struct, frozen=True):
    """A call that the documents show and a test runs; `before` are calls that it needs, not shown."""

    params: Any = msgspec.UNSET
    before: Sequence[tuple[str, Any]] = ()


_NO_EXAMPLE = Example()


class _Nothing(Struct, forbid_unknown_fields=True, gc=False):
    """Params of methods that take none."""


_NOTHING = msgspec.json.Decoder(_Nothing)


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its name, its types, who may call it, what it may raise."""

    name: str
    call: Callable[..., Any]
    params: Any  # None where it takes none
    result: Any
    documentation: str
    role: Role = "authenticated"
    dialect: str = ""
    errors: frozenset[ErrorKind] = frozenset()
    waits: bool | str = False  # a name: of the param that makes it wait where it is not 0
    pages: bool = False
    again: bool | str = False  # a name: of the param with which it is harmless to send it twice
    while_draining: bool = False
    example: Example = _NO_EXAMPLE
    names: tuple[str, ...] = ()  # the params that are names: their length and characters are bounded by a setting
    fields: tuple[str, ...] | None = None  # of a Struct, for params given by place
    is_async: bool = False
    strict: "msgspec.json.Decoder[Any]" = field(default=_NOTHING, repr=False)  # takes none but declared members
    exact: "msgspec.json.Decoder[Any] | None" = field(default=None, repr=False)  # gives `params` itself
    decoder: "msgspec.json.Decoder[Any] | None" = field(default=None, repr=False)  # where params keep bytes

    def run(self, session: Any, arguments: Any) -> Any:
        """Calls it, up to its first wait if it is a short one: its result, or an `eager.Pending`.

        Raises:
            RpcError: what the method raises; limit_exceeded or invalid_params for a name; overloaded.
        """
        for name in self.names:
            if (value := getattr(arguments, name)) is not None:
                codec.check_name(value, session.services.settings.name_chars, name)
        given = (session,) if self.params is None else (session, arguments)
        if self.waits and (self.waits is True or getattr(arguments, self.waits)):
            settings = session.services.settings
            if session.waiting >= settings.waiting:
                words = f"{session.waiting} requests of this connection wait already (waiting)"
                raise overloaded(words, settings.retry_after_ms)
            return eager.Pending(lambda: self.call(*given), waits=True)
        result = self.call(*given)
        return eager.start(result) if self.is_async else result

    def short_arguments(self, params: Raw) -> Any:
        """The params, typed, of a request that has none but declared ones, or whose bytes are kept.

        Raises:
            DecodeError, ValueError: they are to be looked at more closely, by `arguments`.
        """
        if self.decoder is not None:
            given = bytes(params)  # what is kept of them holds these alone, not all that came with them
            if given.count(b"{") > _SHORT_OBJECTS:
                raise ValueError
            orjson.loads(given)  # nobody else proves the bytes that are kept (`codec`)
            return self.decoder.decode(given)
        self.strict.decode(params)  # of a type of its own, which must not get out: Structs of two types are never equal
        return None if self.exact is None else self.exact.decode(params)

    def arguments(self, parsed: Params, message: bytes | Raw) -> Any:
        """The params, typed; None where it takes none.

        Args:
            parsed: What came, parsed.
            message: The whole request, for params that keep bytes.

        Raises:
            RpcError: invalid_params.
        """
        if self.params is None:
            if parsed and type(parsed) is list:  # unknown members are ignored, values by place have no other meaning
                raise invalid_params("", f"{self.name} takes none")
            return None
        if self.fields is None:
            if self.decoder is not None and parsed is not None:
                return codec.decode(self.decoder, raw_params(message))
            return codec.convert([] if parsed is None else parsed, self.params)
        if type(parsed) is list:
            return self._by_place(parsed, message)
        if self.decoder is not None and parsed is not None:
            return codec.decode(self.decoder, raw_params(message))
        return codec.convert({} if parsed is None else parsed, self.params)

    def _by_place(self, parsed: list[Any], message: bytes | Raw) -> Any:
        names = self.fields or ()
        if len(parsed) > len(names):
            raise invalid_params("", f"{len(parsed)} values for at most {len(names)} ({', '.join(names)})")
        if self.decoder is None:
            return codec.convert(dict(zip(names, parsed, strict=False)), self.params)
        values = dict(zip(names, raw_list_decoder.decode(raw_params(message)), strict=False))
        return codec.decode(self.decoder, codec.encode(values))


_SHORT_OBJECTS = 8  # brackets in params that need not be looked at for how deep they nest; arrays: `read_short`
_KEYS = ("idempotency_key", "batch_id")  # params by which the daemon knows that it has done a request already
_NEVER: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder(Literal["never"])

F = TypeVar("F", bound=Callable[..., Any])


def method(
    name: str,
    *,
    role: Role = "authenticated",
    dialect: str = "",
    errors: Iterable[ErrorKind] = (),
    waits: bool | str = False,
    pages: bool = False,
    again: bool | str = False,
    while_draining: bool = False,
    example: Example = _NO_EXAMPLE,
) -> Callable[[F], F]:
    """Declares a method.

    Args:
        name: As it is called.
        role: Who may call it.
        dialect: Spoken by connections that chose it; empty: by all.
        errors: The kinds that it raises itself, beside those that any method may meet.
        waits: It waits on someone (a peer, a tool), so it counts among `waiting`, and reading never pauses for it. It
            runs as a task; what does not wait is run up to its first await by the reader itself, where there is no
            task: `asyncio.timeout` and `TaskGroup` need one, so a method that begins with them says `waits`. The name
            of a param: it waits where that is not 0, and is a short one where it is.
        pages: Its answer may be as large as a page: the peer's next request waits until there is room for it, unless
            this one waits on someone.
        again: A client whose connection was lost before the answer may send it again on the next one: nothing more
            comes of twice than of once. The name of a param: where that is given. What takes an `idempotency_key` or a
            `batch_id` need not say so.
        while_draining: It is answered while the daemon drains.
        example: For the documents.

    Raises:
        TypeError: no docstring, a signature that is not `(session, params) -> result`, `waits` of what cannot, or
            `again` by a param that there is not.
    """

    def declare(function: F) -> F:
        params, result = _signature(function)
        documentation = inspect.cleandoc(function.__doc__ or "")
        if not documentation:
            raise TypeError(f"method {name!r}: the function {function.__qualname__} has no docstring")
        is_struct = inspect.isclass(params) and issubclass(params, Struct)
        is_async = inspect.iscoroutinefunction(function)
        if waits and not (is_async and (waits is True or (is_struct and waits in _field_names(params)))):
            raise TypeError(f"method {name!r}: waits={waits!r} wants a coroutine function, and a param of that name")
        fields = _field_names(params) if is_struct else None if params is not None else ()
        if isinstance(again, str) and again not in (fields or ()):
            raise TypeError(f"method {name!r}: again={again!r} wants a param of that name")
        function.method = Method(  # type: ignore[attr-defined]  # the declaration stays with the function
            name=name,
            call=function,
            params=params,
            result=result,
            documentation=documentation,
            role=role,
            dialect=dialect,
            errors=frozenset(errors),
            waits=waits,
            pages=pages,
            again=next((key for key in _KEYS if key in (fields or ())), again),
            names=_names(params) if is_struct else (),
            while_draining=while_draining,
            example=example,
            strict=_NOTHING if params is None else _strict_decoder(params) if is_struct else _NEVER,
            exact=msgspec.json.Decoder(params) if is_struct else None,
            is_async=is_async,
            fields=fields,
            decoder=msgspec.json.Decoder(params) if _mentions_raw(params) else None,
        )
        return function

    return declare


def _signature(function: Callable[..., Any]) -> tuple[Any, Any]:
    """The types of params (None: it takes none) and of the result."""
    hints = get_type_hints(function, include_extras=True)
    names = list(inspect.signature(function).parameters)
    if len(names) not in (1, 2) or "return" not in hints:
        raise TypeError(f"{function.__qualname__}: write it as (session, params: P) -> R, or (session) -> R")
    result = hints["return"]
    while get_origin(result) in (Encoded, Replied, Awaitable):
        result = get_args(result)[0]
    return (hints[names[1]] if len(names) == 2 else None), result


def _field_names(params: type[Struct]) -> tuple[str, ...]:
    return tuple(member.encode_name for member in msgspec.structs.fields(params))


def _strict_decoder(params: type[Struct]) -> "msgspec.json.Decoder[Any]":
    """Decodes what has no undeclared members; where bytes are kept, which it does not prove, there is another way."""
    if _keeps_bytes(params):
        return _NEVER
    return msgspec.json.Decoder(msgspec.defstruct(params.__name__, [], bases=(params,), forbid_unknown_fields=True))


def _names(params: type[Struct]) -> tuple[str, ...]:
    return tuple(member.name for member in msgspec.structs.fields(params) if _is_name(member.type))


def _is_name(type_: Any) -> bool:
    if any(isinstance(note, msgspec.Meta) and note.extra == IS_NAME for note in getattr(type_, "__metadata__", ())):
        return True
    return get_origin(type_) in (Union, UnionType) and any(_is_name(kind) for kind in get_args(type_))


def _keeps_bytes(params: type[Struct]) -> bool:
    return any(_mentions_raw(member.type) for member in msgspec.structs.fields(params))


def _mentions_raw(type_: Any) -> bool:
    if inspect.isclass(type_) and issubclass(type_, Struct):
        return _keeps_bytes(type_)
    return type_ is Raw or any(_mentions_raw(argument) for argument in get_args(type_))


class Table:
    """All methods, by name and dialect.

    What is declared for a dialect alone, without a native twin, is found by who speaks none too: the CAR clients up to
    0.20.0 never make its handshake.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods: dict[tuple[str, str], Method] = {}
        for entry in methods:
            key = (entry.name, entry.dialect)
            if key in self._methods:
                raise TypeError(f"method {entry.name!r} is declared twice")
            self._methods[key] = entry
        foreign = {name: entry for (name, dialect), entry in self._methods.items() if dialect}
        self._plain = foreign | self._of("")
        dialects = {dialect for _, dialect in self._methods if dialect}
        self._dialects = {dialect: self._plain | self._of(dialect) for dialect in dialects}

    def _of(self, dialect: str) -> dict[str, Method]:
        return {name: entry for (name, spoken), entry in self._methods.items() if spoken == dialect}

    @classmethod
    def of(cls, modules: Iterable[ModuleType]) -> "Table":
        """The methods of these modules, in the order in which they stand there.

        Raises:
            TypeError: a double name, or a module without methods.
        """
        found: list[Method] = []
        for module in modules:
            declared = [
                entry.method
                for entry in vars(module).values()
                if isinstance(getattr(entry, "method", None), Method) and entry.__module__ == module.__name__
            ]
            if not declared:
                raise TypeError(f"module {module.__name__!r} declares no @method function")
            found += declared
        return cls(found)

    def find(self, name: str, dialect: str) -> Method | None:
        """The dialect's own, else the native one, else another dialect's."""
        return self.spoken(dialect).get(name)

    def spoken(self, dialect: str) -> Mapping[str, Method]:
        """All that a connection finds which speaks this (empty: no dialect), by name."""
        return self._dialects.get(dialect, self._plain)

    def all(self) -> Mapping[tuple[str, str], Method]:
        """Every method, by (name, dialect)."""
        return self._methods
