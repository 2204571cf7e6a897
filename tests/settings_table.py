"""The table of settings in docs/operating.md, made of `config.Settings`: names, defaults, and the comments beside them.

`scripts/docs` writes it; a test fails when it is stale.
"""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import msgspec

from carserver import config
from carserver.cli.serve import serve
from carserver.config import KIB, MIB, Settings

PAGE = Path(__file__).parent.parent / "docs/operating.md"
BEGIN = "<!-- settings: written by scripts/docs from carserver/config.py; do not edit -->"
END = "<!-- end of settings -->"

_BETWEEN = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
_UNITS = {"_ms": "ms", "_s": "s"}


def with_table(text: str) -> str:
    """A page with the table of today."""
    made, replaced = _BETWEEN.subn(lambda _: f"{BEGIN}\n\n{table()}\n{END}", text)
    assert replaced == 1, f"{PAGE.name} has no place for the settings"
    return made


def table() -> str:
    """A table a section, in the order of the source."""
    source = Path(config.__file__).read_text()
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (struct,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == Settings.__name__
    )
    fields = {
        node.lineno: node.target.id
        for node in struct.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert tuple(fields.values()) == Settings.__struct_fields__
    assert struct.end_lineno is not None
    lines: list[str] = []
    for number in range(min(fields) - 1, struct.end_lineno + 1):
        if number in fields:
            lines.append(_row(fields[number], comments.get(number, "")))
        elif number in comments:
            assert number - 1 not in comments, "a heading is a line; what belongs to a setting stands beside it"
            lines += ["", f"**{comments[number]}**", "", "| setting | default | |", "|---|---|---|"]
    return "\n".join([*lines[1:], ""])


def _row(name: str, words: str) -> str:
    flag = _FLAGS.get(name)
    shown = f"`{name}`" + (f", `{flag}`" if flag else "")
    return f"| {shown} | {_value(name, _DEFAULTS[name])} | {words} |"


def _value(name: str, value: Any) -> str:
    """A default as a person writes it, with its unit."""
    if value is None or value in ("", ()):
        return ""
    if isinstance(value, bool | str):
        return f"`{str(value).lower() if isinstance(value, bool) else value}`"
    if name.endswith("_bytes") and value % KIB == 0:
        return f"{value // MIB:,} MiB" if value % MIB == 0 else f"{value // KIB:,} KiB"
    if name == "port":
        return f"{value}"  # a name made of digits
    unit = next((f" {unit}" for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return f"{value:g}{unit}" if isinstance(value, float) else f"{value:,}{unit}"


def _flags() -> dict[str, str]:
    """What the command line has a flag for. `auth` is turned off by one of another name."""
    return {str(option.name): option.opts[0] for option in serve.params} | {"auth": "--no-auth"}


_FLAGS = _flags()
_DEFAULTS = msgspec.structs.asdict(Settings())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
