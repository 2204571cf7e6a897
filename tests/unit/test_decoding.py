"""What a command writes, as chunks: `hosts.decoding`."""

import msgspec
import pytest

from carserver.config import Settings
from carserver.core.chunks import encoded
from carserver.hosts.decoding import Decoder, LineDecoder, TextDecoder
from carserver.protocol.tools import DataChunk, GivenChunk, GivenDone, TextChunk

SETTINGS = Settings()
CHUNK_BYTES = SETTINGS.chunk_bytes


def said(chunk: GivenChunk) -> object:
    """A chunk as a value to compare: text as a string, everything else as its JSON's value."""
    if isinstance(chunk, TextChunk) and not chunk.stream:
        return chunk.text
    return msgspec.json.decode(msgspec.json.encode(chunk))


def decoded(decoder: Decoder, *reads: bytes) -> list[object]:
    chunks = [chunk for read in reads for chunk in decoder.take(read)]
    return [said(chunk) for chunk in [*chunks, *decoder.end()]]


def lines(*reads: bytes) -> list[object]:
    return decoded(LineDecoder(SETTINGS), *reads)


def data(value: object) -> dict[str, object]:
    return {"kind": "data", "data": value}


def joined(chunks: list[object]) -> str:
    assert all(isinstance(chunk, str) for chunk in chunks)
    return "".join(map(str, chunks))


def test_a_character_that_reads_divide_is_joined() -> None:
    source = "a\u00e9\u20ac\U0001f600z".encode()
    assert joined(decoded(TextDecoder(), *[source[at : at + 1] for at in range(len(source))])) == source.decode()


def test_what_is_no_utf_8_is_replaced_and_half_a_character_at_the_end_too() -> None:
    assert joined(decoded(TextDecoder(), b"a\xffb", b"\xe2\x82")) == "a\ufffdb\ufffd"


def test_text_of_standard_error_says_so() -> None:
    assert decoded(TextDecoder(is_stderr=True), b"oh") == [{"kind": "text", "text": "oh", "stream": "stderr"}]


def test_nothing_is_no_chunk() -> None:
    assert decoded(TextDecoder()) == []
    assert lines() == []


def test_a_line_of_json_is_data_wherever_the_reads_divide_it() -> None:
    source = b'{"a": 1}\n[1e5]\r\n"\xc3\xa9"\n 7 \nnull\n'
    wanted = [data({"a": 1}), data([1e5]), data("\u00e9"), data(7), data(None)]
    assert lines(source) == wanted
    assert lines(*[source[at : at + 1] for at in range(len(source))]) == wanted


def test_numbers_keep_their_digits() -> None:
    (chunk,) = LineDecoder(SETTINGS).take(b"1.10000000000000000001\n")
    assert isinstance(chunk, DataChunk)
    assert bytes(chunk.data) == b"1.10000000000000000001"


def test_a_last_line_needs_no_line_break() -> None:
    assert lines(b'{"a":1}') == [data({"a": 1})]
    assert lines(b"plain") == ["plain"]


def test_a_line_that_is_a_chunk_is_that_chunk() -> None:
    assert lines(
        b'{"kind":"text","text":"t"}\n{"kind":"text","text":"e","stream":"stderr"}\n{"kind":"data","data":[1]}\n'
        b'{"kind":"progress","fraction":0.5,"message":"half"}\n{"kind":"done","result":{"r":1}}\n'
        b'{"kind":"error","message":"no"}\n{"kind":"done"}\n'
    ) == [
        "t",
        {"kind": "text", "text": "e", "stream": "stderr"},
        data([1]),
        {"kind": "progress", "fraction": 0.5, "message": "half"},
        {"kind": "done", "result": {"r": 1}},
        {"kind": "error", "message": "no"},
        {"kind": "done"},
    ]


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"text"}',
        b'{"kind":"text","text":5}',
        b'{"kind":"text","text":"a","stream":"stdin"}',
        b'{"kind":"progress","fraction":7}',
        b'{"kind":"error"}',
        b'{"kind":"other"}',
        b'{"kind":null}',
        b'{"kind":["text"]}',
    ],
)
def test_an_object_that_only_looks_like_a_chunk_is_data(line: bytes) -> None:
    assert lines(line + b"\n") == [data(msgspec.json.decode(line))]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"plain",
        b"{",
        b"{'a': 1}",
        b'{"a":1} {"b":2}',
        b"1e999",
        b"NaN",
        b'"\\ud800"',
        b"01",
        b"\xef\xbb\xbf1",
        b" ",
    ],
)
def test_a_line_that_is_no_json_is_text_with_its_line_break(line: bytes) -> None:
    assert lines(line + b"\n", b"1\n") == [line.decode() + "\n", data(1)]


def test_a_line_that_is_no_utf_8_is_text() -> None:
    assert lines(b'"\xff"\n') == ['"\ufffd"\n']


def test_lines_of_text_stay_in_order_and_are_one_chunk_a_read() -> None:
    assert lines(b"a\nb\r\n1\nc\n") == ["a\nb\r\n", data(1), "c\n"]


@pytest.mark.parametrize(("brackets", "is_data"), [(SETTINGS.value_nesting, True), (SETTINGS.value_nesting + 1, False)])
def test_a_line_that_nests_deeper_than_a_value_may_is_text(brackets: int, is_data: bool) -> None:
    line = b"[" * brackets + b"]" * brackets
    (chunk,) = lines(line + b"\n")
    assert isinstance(chunk, dict) is is_data


@pytest.mark.parametrize("size", range(CHUNK_BYTES - 30, CHUNK_BYTES + 3))
def test_a_line_is_data_if_its_chunk_is_no_larger_than_one_may_be_and_else_text(size: int) -> None:
    line = b'"%b"' % (b"a" * (size - 2))
    (chunk, *rest) = list(LineDecoder(SETTINGS).take(line + b"\n"))
    assert rest == []
    if len(encoded(DataChunk(data=msgspec.Raw(line)))) <= CHUNK_BYTES:
        assert isinstance(chunk, DataChunk)
    else:
        assert isinstance(chunk, TextChunk)
        assert chunk.text == line.decode() + "\n"


def test_a_long_line_is_text_as_it_comes_and_is_not_held() -> None:
    decoder = LineDecoder(SETTINGS)
    read = "\u20ac".encode() * 7_000  # a character of three bytes, divided below
    given = read * 500
    text = ""
    held = 0
    for at in range(0, len(given), 65_536):
        chunks = list(decoder.take(given[at : at + 65_536]))
        text += joined([said(chunk) for chunk in chunks])
        held = max(held, at + 65_536 - len(text.encode()))
    assert held <= CHUNK_BYTES + 65_536
    text += joined([said(chunk) for chunk in decoder.take(b"\n")])
    assert text == given.decode() + "\n"
    assert [said(chunk) for chunk in decoder.take(b"1\n")] == [data(1)], "the next line is read as any other"


def test_a_last_chunk_is_a_last_chunk() -> None:
    (chunk,) = LineDecoder(SETTINGS).take(b'{"kind":"done","result":null}\n')
    assert isinstance(chunk, GivenDone)
