"""What agents wrote is shown, never obeyed."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carserver.cli.plain import clipped, visible, visible_json, visible_lines

TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too


@given(TEXT)
def test_nothing_that_a_terminal_obeys_or_hides_is_left(text: str) -> None:
    for character in visible(text):
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert unicodedata.bidirectional(character) not in {
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        }
    visible(text).encode()


@given(TEXT)
def test_lines_differ_from_that_in_line_breaks_and_tabs_only(text: str) -> None:
    assert visible_lines(text).replace("\n", "\\n").replace("\t", "\\t") == visible(text)


@given(st.recursive(TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
def test_json_stays_the_same_value(value: object) -> None:
    for indent in (None, 2):
        shown = visible_json(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(shown) == value
        assert visible_lines(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08c\x7f", "a\\rb\\x08c\\x7f"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("hid\U000e0041den", "hid\\U000e0041den"),
        ("[bold]not markup[/]", "[bold]not markup[/]"),
        ("Grüße 日本 👩\u200d💻", "Grüße 日本 👩\u200d💻"),
    ],
)
def test_what_is_dangerous_becomes_readable_and_the_rest_stays(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_cut_is_marked() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdefg", 6) == "abcde…"
