r"""How text that came from agents is shown: what a terminal would obey, or hide, is made visible instead.

Control characters (escape sequences begin with one), the controls of bidirectional text, invisible characters that
carry text of their own, and lone surrogates become `\x1b`, `\u202e`, `\U000e0041`. Joiners stay: words and emoji are
made with them. Whoever prints with rich passes `Text`, which knows no markup.
"""

import re

_LINE_CONTROLS = "\t\n"
_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0 and C1 controls: escape sequences
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029"  # invisible, or a line break to some
    "\u202a-\u202e\u2060-\u206f"  # bidirectional embeddings, overrides, isolates
    "\ufeff\ufff9-\ufffb"
    "\ud800-\udfff"  # lone surrogates: no output encoding takes them
    "\U000e0000-\U000e007f"  # tags: invisible text
    "]"
)


def visible(text: str) -> str:
    """`text` on one line: line breaks and tabs are made visible too."""
    return _UNSAFE.sub(_escape, text)


def visible_lines(text: str) -> str:
    """`text` with its line breaks and tabs."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in _LINE_CONTROLS else _escape(found), text)


def visible_json(text: str) -> str:
    """JSON, formatted or not, as the same JSON: such characters stand only inside strings, where an escape is equal."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in _LINE_CONTROLS else _escape_json(found), text)


def clipped(text: str, characters: int) -> str:
    """`text`, cut with an ellipsis where it is longer; never inside an escape that `visible` makes later."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    short = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def _escape_json(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
