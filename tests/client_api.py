"""Writes carserver/client/api and its synchronous twin api_sync from the daemon's own method table.

A module with a class for each namespace, a typed method for each method, their words from the methods' own docstrings;
and which of them may be sent again. `scripts/docs` calls this; a test fails when they are stale.
"""

import builtins
import enum
import inspect
import keyword
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, UNSET, Raw, Struct, UnsetType

from carserver.rpc.method import Method
from tests.daemon import ROOT
from tests.reference import table

FOLDER = ROOT / "carserver/client"
WIDTH = 112  # of a docstring's lines: 120, less what they are indented by

_ASYNC = '''\
"""The daemon's methods, typed: a class and a module for each namespace, made on anything that calls.

*Generated from the daemon's method table by `scripts/docs`; do not edit.* What is left out (None, or UNSET where null
means something) is not sent. `Any` is any JSON value, `msgspec.Raw` included. Results have JSON of any shape as
`msgspec.Raw`, by the bytes that came; `msgspec.json.decode` makes a value of it.
"""
'''
_SYNC = '''\
"""The daemon's methods, typed, for who has no loop: the same as `api`, each of them blocking until it is answered.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""
'''
_MODULE = '''\
"""`{namespace}.*` of the daemon, typed{blocking}: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""
'''
_NOQA = "# ruff: noqa: A002 - params have the names that they have on the wire\n"

_AGAIN = '''
"""What may be sent again where the answer was lost: nothing more comes of twice than of once. A name is that of the
param with which it is so."""
'''


class Imports:
    """The names that a file needs, by module."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def add(self, module: str, name: str) -> str:
        """The name itself."""
        self._names.setdefault(module, set()).add(name)
        return name

    def lines(self) -> Iterator[str]:
        """As ruff would sort them: the standard library, packages, ours."""
        groups = (("collections.abc", "typing"), ("msgspec",))
        ours = sorted(set(self._names) - {module for group in groups for module in group})
        for group in (*groups, ours):
            needed = [module for module in group if module in self._names]
            if needed:
                yield ""
            for module in needed:
                yield f"from {module} import {', '.join(sorted(self._names[module], key=_isort))}"


def _isort(name: str) -> tuple[bool, str]:
    """Constants first."""
    return not name.isupper(), name


def files() -> dict[Path, str]:
    """All that is written, by its place."""
    found = {}
    for blocking in (False, True):
        package = FOLDER / ("api_sync" if blocking else "api")
        found[package / "__init__.py"] = _package(package.name, blocking=blocking)
        for namespace, entries in _namespaces().items():
            found[package / f"{namespace}.py"] = _module(namespace, entries, blocking=blocking)
    return found


def _package(name: str, *, blocking: bool) -> str:
    imports = Imports()
    classes = [
        imports.add(f"carserver.client.{name}.{namespace}", namespace.capitalize()) for namespace in _namespaces()
    ]
    again = ""
    if not blocking:
        again = f"AGAIN: {imports.add('collections.abc', 'Mapping')}[str, bool | str] = {_again()}{_AGAIN}"
        classes.append("AGAIN")
    listed = f"__all__ = {sorted(classes, key=_isort)!r}"
    return _formatted("\n".join([_SYNC if blocking else _ASYNC, *imports.lines(), "", listed, "", again]))


def _module(namespace: str, entries: list[Method], *, blocking: bool) -> str:
    imports = Imports()
    calls = imports.add("carserver.client.calls", "BlockingCalls" if blocking else "Calls")
    body = [f'\nclass {namespace.capitalize()}:\n    """`{namespace}.*`."""\n']
    body.append(f"    def __init__(self, calls: {calls}) -> None:\n        self._calls = calls\n")
    body += [textwrap.indent(_method(entry, imports, blocking=blocking), "    ") for entry in entries]
    head = _MODULE.format(namespace=namespace, blocking=", blocking" if blocking else "")
    noqa = _NOQA if any(_shadows(entry) for entry in entries) else ""
    return _formatted("\n".join([head + noqa, *imports.lines(), *body]))


def _shadows(entry: Method) -> bool:
    """Whether a param has the name of a builtin."""
    return any(hasattr(builtins, name) for name in entry.fields or ())


def _formatted(source: str) -> str:
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--stdin-filename", str(FOLDER / "api.py"), "-"]
    return subprocess.run(ruff, input=source, stdout=subprocess.PIPE, check=True, text=True).stdout


def methods() -> list[Method]:
    """The native ones, but that with which a connection begins to speak a dialect: the client speaks none."""
    return [entry for entry in table().all().values() if not entry.dialect and entry.name != "server.handshake"]


def _namespaces() -> dict[str, list[Method]]:
    found: dict[str, list[Method]] = {}
    for entry in methods():
        found.setdefault(entry.name.partition(".")[0], []).append(entry)
    return found


def _again() -> dict[str, bool | str]:
    return {entry.name: entry.again for entry in methods() if entry.again}


# One method.


def _method(entry: Method, imports: Imports, *, blocking: bool) -> str:
    required, optional = _params(entry, imports)
    signature = ["self", *(f"{param}: {type_}" for param, type_ in required)]
    if optional:
        signature += ["*", *(f"{param}: {type_} = {default}" for param, type_, default in optional)]
    result = _words(entry.result, imports, given=False)
    words = [
        repr(entry.name),
        _sent(entry, required, optional, imports),
        f"result_type={result}",
        f"again={_again_of(entry)}",
    ]
    calls, waits = ("def", "") if blocking else ("async def", "await ")
    called = f"{waits}self._calls.call({', '.join(words)})"
    return "\n".join(
        [
            f"{calls} {method_name(entry)}({', '.join(signature)}) -> {result}:",
            textwrap.indent(f'"""{_documentation(entry)}"""', "    "),
            f"    answer: {result} = {called}",
            "    return answer",
            "",
        ]
    )


def method_name(entry: Method) -> str:
    """What a method is called by in its namespace: `import_`, `trace_subscribe`."""
    name = entry.name.partition(".")[2].replace(".", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def _again_of(entry: Method) -> str:
    return f"{entry.again} is not None" if isinstance(entry.again, str) else str(entry.again)


def _documentation(entry: Method) -> str:
    summary, _, rest = entry.documentation.partition("\n\n")
    paragraphs = [summary, *(paragraph for paragraph in rest.split("\n\n") if paragraph)]
    paragraphs += ["For the host."] if entry.role == "host" else []
    filled = [textwrap.fill(paragraph, WIDTH, break_on_hyphens=False) for paragraph in paragraphs]
    if entry.errors:
        own = ", ".join(f"`{kind.type}`" for kind in sorted(entry.errors, key=lambda kind: kind.type))
        filled.append(f"Raises:\n    CallError: {own}, and what any call may raise.")
    return "\n\n".join(filled) + ("\n" if len(filled) > 1 else "")


def _params(entry: Method, imports: Imports) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Names and types of the required params; names, types and defaults of the others."""
    if entry.params is None:
        return [], []
    if entry.fields is None:
        return [("values", _words(entry.params, imports, given=True))], []
    required, optional = [], []
    for member in msgspec.structs.fields(entry.params):
        type_ = _words(member.type, imports, given=True)
        if member.default is NODEFAULT:
            required.append((member.encode_name, type_))
        else:
            default = imports.add("msgspec", "UNSET") if member.default is UNSET else repr(member.default)
            optional.append((member.encode_name, type_, default))
    return required, optional


def _sent(
    entry: Method, required: list[tuple[str, str]], optional: list[tuple[str, str, str]], imports: Imports
) -> str:
    """The params, as an expression."""
    if entry.fields is None:
        return "values"
    if not entry.fields:
        return "None"
    absent = [name for name, _, default in optional if default == "None"]
    always = [name for name, _ in required] + [name for name, _, default in optional if default != "None"]
    members = f"{{{', '.join(f'{name!r}: {name}' for name in always)}}}"
    if not absent and "UNSET" not in [default for _, _, default in optional]:
        return members
    arguments = [members, *(f"{name}={name}" for name in absent)]
    return f"{imports.add('carserver.client.calls', 'given')}({', '.join(arguments)})"


# One type.


def _words(type_: Any, imports: Imports, *, given: bool) -> str:
    """A type as it is written; of params (`given`) what a caller may give, which is more."""
    kinds = sorted(set(_kinds(type_, imports, given=given)), key=lambda kind: (kind == "None", kind[0].islower(), kind))
    return imports.add("typing", "Any") if "Any" in kinds else " | ".join(kinds)


def _kinds(type_: Any, imports: Imports, *, given: bool) -> Iterable[str]:
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return _kinds(arguments[0], imports, given=given)
    if origin in (Union, UnionType):
        return [kind for one in arguments for kind in _kinds(one, imports, given=given)]
    if origin is Literal:
        return [f"{imports.add('typing', 'Literal')}[{', '.join(map(repr, arguments))}]"]
    if origin is list and given:
        return [f"{imports.add('collections.abc', 'Sequence')}[{_words(arguments[0], imports, given=given)}]"]
    if origin in (list, dict):
        return [f"{origin.__name__}[{', '.join(_words(one, imports, given=given) for one in arguments)}]"]
    if type_ is UnsetType:
        return []
    if type_ is NoneType:
        return ["None"]
    if (type_ is Raw and given) or type_ is Any:
        return [imports.add("typing", "Any")]
    if not inspect.isclass(type_):
        raise TypeError(f"no words for {type_!r}")
    if issubclass(type_, Struct) and given:  # its members may be of types that are more easily written as JSON
        return [imports.add(type_.__module__, type_.__name__), f"dict[str, {imports.add('typing', 'Any')}]"]
    if issubclass(type_, Struct | enum.Enum):
        return [imports.add(type_.__module__, type_.__name__)]
    return [type_.__name__]


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        sys.stderr.write(f"wrote {path.relative_to(Path.cwd())}\n")
