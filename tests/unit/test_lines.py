"""The line reader and writer: however a stream is cut, the same lines; each byte looked at once."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from carserver.front.frames import TEXT, Message
from carserver.front.lines import BLANK, NOT_UTF8, LineReader, LineTooLong, line
from carserver.protocol.closing import Close

KIB, MIB = 1024, 1024 * 1024


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    """`stream` in pieces."""
    places = sorted({0, len(stream), *(place % (len(stream) + 1) for place in cuts)})
    return [stream[at:to] for at, to in pairwise(places)]


def read(reader: LineReader, pieces: list[bytes]) -> tuple[list[Message], LineTooLong | None]:
    """Everything that comes of these reads and of the end, and what was too long behind it."""
    messages: list[Message] = []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (message := reader.next()) is not None:
                messages.append(message)
        reader.finish()
        while (message := reader.next()) is not None:
            messages.append(message)
    except LineTooLong as error:
        return messages, error
    return messages, None


def kind(text: bytes) -> int:
    try:
        text.decode()
    except UnicodeDecodeError:
        return NOT_UTF8
    return TEXT if text.strip(b" \t\r") else BLANK


def expected(stream: bytes, maximum: int) -> tuple[list[tuple[int, bytes]], bool]:
    """By the definition: the lines (of what is no UTF-8, that) up to one that is too long, and whether there is one."""
    lines = stream.split(b"\n")
    if not lines[-1]:
        lines.pop()
    found: list[tuple[int, bytes]] = []
    for text in lines:
        if len(text) > maximum:
            return found, True
        found.append((kind(text), b"" if kind(text) == NOT_UTF8 else text))
    return found, False


pieces_of_streams = st.lists(
    st.one_of(
        st.sampled_from([b"\n", b"\r\n", b" ", b"\f", b"{}", b"\xff", "é".encode(), b"\xc3", b"x" * 30]),
        st.binary(max_size=5),
    )
).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(stream=pieces_of_streams, cuts=st.lists(st.integers(0, 200), max_size=20), maximum=st.integers(1, 40))
@example(stream=b"\n\n\n", cuts=[1, 2], maximum=1)
@example(stream="é\n".encode(), cuts=[1], maximum=2)
@example(stream=b"xx", cuts=[1], maximum=1)
def test_however_a_stream_is_cut_its_lines_are_the_same(stream: bytes, cuts: list[int], maximum: int) -> None:
    messages, error = read(LineReader(maximum), cut(stream, cuts))
    lines, too_long = expected(stream, maximum)
    assert [(got, b"" if got == NOT_UTF8 else text) for got, text in messages] == lines
    assert (error is not None) == too_long


@pytest.mark.parametrize("end", [b"\n", b""], ids=["with its end", "before its end has come"])
def test_a_line_of_the_maximum_is_taken_and_of_one_byte_more_the_size_is_told(end: bytes) -> None:
    assert read(LineReader(10), [b"x" * 10 + b"\n"]) == ([(TEXT, b"x" * 10)], None)
    messages, error = read(LineReader(10), [b"ok\n", b"x" * 5, b"x" * 6 + end])
    assert messages == [(TEXT, b"ok")]
    assert error is not None
    assert (error.code, error.reason) == (Close.TOO_BIG, "line over message_bytes (10)")
    assert error.error.to_wire()["data"] == {
        "type": "limit_exceeded",
        "limit": "message_bytes",
        "value": 11,
        "maximum": 10,
    }


def test_after_a_line_that_is_too_long_nothing_comes_and_nothing_is_kept() -> None:
    reader = LineReader(10)
    assert read(reader, [b"x" * 11])[1] is not None
    reader.feed(b"{}\n" * 1_000)
    reader.finish()
    assert reader.next() is None
    assert reader._data == b""


def test_sixteen_megabytes_in_a_million_reads_take_no_longer_than_they_must() -> None:
    """Were each read to look at all that came before, this would be eight terabytes: the test would not end in time."""
    reader, size = LineReader(16 * MIB), 16
    piece = b"x" * size
    for _ in range(MIB):
        reader.feed(piece)
        assert reader.next() is None
    reader.feed(b"\n{}\n")
    first, second, third = reader.next(), reader.next(), reader.next()
    assert first == (TEXT, b"x" * 16 * MIB)
    assert (second, third) == ((TEXT, b"{}"), None)
    assert not reader._data, "an idle connection does not pin its last read"


def test_a_json_text_is_one_line_whatever_line_breaks_it_has() -> None:
    value = {"a": [1, "x\ny"], "b": 1e3}
    assert line(b'{"a":1}') == b'{"a":1}\n'
    framed = line(json.dumps(value, indent=2).encode())
    assert framed.count(b"\n") == 1
    assert json.loads(framed) == value
