"""What is answered to a call of a method that there is not: what there is instead."""

import difflib
from collections.abc import Collection, Sequence

from carserver.protocol.errors import ErrorKind, RpcError

_COMPARED = 128  # characters of a name, from its beginning; a longer one is not shown
_NEAREST = 3
_ALIKE = 0.8  # of two names, as difflib measures it; `policy.register` and `tools.register` are 0.76
_LISTED = 480  # characters of the names in a hint


class UnknownMethod(RpcError):
    """A method that there is not. Its message is written only for who is answered: it costs more than all else does."""

    def __init__(self, name: str) -> None:
        super().__init__(ErrorKind.METHOD_NOT_FOUND, "no such method")
        self.name = name

    def with_hint(self, names: Collection[str], dialect: str) -> RpcError:
        """The same, in words; `names` are those that the caller may find."""
        shown = repr(self.name) if len(self.name) <= _COMPARED and self.name.isprintable() else "of that name"
        words = hint(self.name, names, "capabilities.list" if dialect else "rpc.discover")
        return RpcError(self.kind, f"no method {shown}; {words}", hint=words)


def hint(name: str, names: Collection[str], lister: str) -> str:
    """In one line: the nearest names; else those of its area; else the areas that there are."""
    ending = f"; {lister} lists all; a module of methods adds others (carserver serve --methods MODULE)"
    name = name[:_COMPARED]
    area, dot, _ = name.partition(".")
    near = difflib.get_close_matches(name, names, _NEAREST, _ALIKE)
    same = sorted(there for there in names if dot and there.startswith(area + dot))
    if near:
        begin, found = "the nearest: ", near
    elif same:
        begin, found = f"there are, of {area}.*: ", same
    else:
        begin, found = "there are: ", sorted({there.partition(".")[0] + ".*" for there in names if "." in there})
    return begin + _listed(found, _LISTED) + ending


def _listed(names: Sequence[str], room: int) -> str:
    """As many of them as there is room for; of the others, their number."""
    shown = 0
    for name in names:
        room -= len(name) + len(", ")
        if room < 0:
            break
        shown += 1
    others = f" and {len(names) - shown} more" if shown < len(names) else ""
    return ", ".join(names[:shown]) + others
