"""Hostile frames over the socket (contract, section 4). What can be survived is, the rest is told.

The limits among them have their own file, `test_limits.py`; generated messages are in `tests/property`.
"""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import rawpeer
from tests.daemon import Daemon, running
from tests.peer import Peer, peer
from tests.rawpeer import CLOSE, CONTINUATION, PING, PONG, TEXT, frame, raw_peer

BIG = 2**53


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("hostile") / "state", "--methods", "tests.methods_for_tests") as daemon:
        yield daemon


async def alive(client: Peer) -> None:
    """The connection still answers, and nothing else came."""
    assert (await client.call("server.ping"))["now_ms"] > 0
    assert client.pushed.empty()


def is_error(answer: Any, code: int, type_: str, id_: Any = None) -> dict[str, Any]:
    assert set(answer) == {"jsonrpc", "id", "error"}
    assert (answer["jsonrpc"], answer["error"]["code"], answer["error"]["data"]["type"]) == ("2.0", code, type_)
    assert (answer["id"], type(answer["id"])) == (id_, type(id_))
    error: dict[str, Any] = answer["error"]
    return error


def nested(depth: int, inside: str = "0", open_: str = "[") -> str:
    """A value with `depth` brackets around `inside`."""
    close = {"[": "]", '{"a":': "}"}[open_]
    return open_ * depth + inside + close * depth


def ping(more: str = "", id_: str = "1") -> str:
    return f'{{"jsonrpc":"2.0","id":{id_},"method":"server.ping"{more}}}'


MALFORMED = {
    "nothing": "",
    "only spaces": "  ",
    "a bad escape": ping(r',"x":"\x41"'),
    "a short unicode escape": ping(r',"x":"\u12"'),
    "a lone high surrogate": ping(r',"x":"\ud800"'),
    "a lone low surrogate": ping(r',"x":"\udc00"'),
    "two high surrogates": ping(r',"x":"\ud800\ud800"'),
    "a lone surrogate in a key": ping(r',"\ud800":1'),
    "a raw line break in a string": ping(',"x":"a\nb"'),
    "a raw NUL in a string": ping(',"x":"a\0b"'),
    "NaN": ping(',"x":NaN'),
    "Infinity": ping(',"x":Infinity'),
    "minus Infinity": ping(',"x":-Infinity'),
    "a number above a double": ping(',"x":1e999'),
    "a number below a double": ping(',"x":-1e999'),
    "an integer above a double": ping(f',"x":{"9" * 400}'),
    "truncated": ping()[:-1],
    "truncated in a string": ping()[:-3],
    "trailing garbage": ping() + "x",
    "two messages in one": ping() + ping(),
    "a byte order mark": "\ufeff" + ping(),
    "a leading zero": ping(',"x":01'),
    "a leading plus": ping(',"x":+1'),
    "no digit before the point": ping(',"x":.5'),
    "no digit after the point": ping(',"x":1.'),
    "hexadecimal": ping(',"x":0x10'),
    "single quotes": ping(",'x':1"),
    "a trailing comma": ping(","),
    "a trailing comma in an array": ping(',"x":[1,]'),
    "a comment": ping(',/* */"x":1'),
    "an unquoted key": ping(",x:1"),
    "a word": "undefined",
    "65 brackets": nested(65),
    "65 empty brackets": nested(65, ""),
    "65 brackets, curly": nested(65, '"a"', '{"a":'),
    "65 empty brackets, curly and square": nested(64, "{}"),
    "65 brackets in a request": ping(f',"x":{nested(64)}'),
    "100,000 brackets": nested(100_000),
    "100,000 brackets that are not closed": "[" * 100_000,
    "100,000 curly brackets": nested(100_000, "1", '{"a":'),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
async def test_what_is_not_json_is_a_parse_error_and_the_connection_lives_on(text: str, served: Daemon) -> None:
    async with peer(served) as client:
        is_error(await client.raw(text), -32700, "parse_error")
        await alive(client)


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "1e999", "01", nested(62)])
async def test_what_is_not_json_within_an_event_is_not_recorded(value: str, served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        params = f'{{"run_id":"{run_id}","events":[{{"type":"good"}},{{"type":"bad","value":{value}}}]}}'
        answer = await client.raw(f'{{"jsonrpc":"2.0","id":"r","method":"runs.record","params":{params}}}')
        is_error(answer, -32700, "parse_error")
        assert (await client.call("runs.get", {"run_id": run_id}))["event_count"] == 0
        await alive(client)


HARMLESS = {
    "64 brackets": ping(f',"x":{nested(63)}'),
    "64 empty brackets": ping(f',"x":{nested(63, "")}'),
    "many brackets side by side": ping(f',"x":[{",".join(["[]"] * 5_000)}]'),
    "brackets in a string": ping(f',"x":"{"[" * 500}"'),
    "a pair of surrogates": ping(r',"x":"\ud83d\ude00"'),
    "an escaped NUL": ping(r',"x":"\u0000"'),
    "the largest double": ping(',"x":1.7976931348623157e308'),
    "a number that a double rounds to 0": ping(',"x":1e-400'),
    "an integer above 64 bits": ping(',"x":123456789012345678901234567890'),
    "raw line breaks between tokens": ping(',\r\n\t"x":\n1'),
    "unknown members": ping(',"x":1,"result_":2'),
    "unknown members of params": ping(',"params":{"x":1}'),
    "empty params": ping(',"params":{}'),
    "empty params by place": ping(',"params":[]'),
    "duplicate keys": '{"jsonrpc":"1","id":7,"id":1,"method":"x","jsonrpc":"2.0","method":"server.ping"}',
    "escaped keys": r'{"\u006asonrpc":"2.0","id":1,"m\u0065thod":"server\u002eping"}',
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS.keys())
async def test_what_looks_strange_but_is_right_is_answered(text: str, served: Daemon) -> None:
    async with peer(served) as client:
        answer = await client.raw(text)  # the peer has not used id 1 yet, so nobody waits for it
        assert (answer["id"], list(answer["result"])) == (1, ["now_ms"])


async def test_of_duplicate_params_the_last_count_for_what_keeps_bytes_too(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        first, last = ({"run_id": run_id, "events": [{"type": type_}]} for type_ in ("first", "last"))
        text = '{"jsonrpc":"2.0","id":"r","method":"runs.record"'
        answer = await client.raw(f'{text},"params":{json.dumps(first)},"\\u0070arams":{json.dumps(last)}}}')
        assert answer["result"]["count"] == 1
        page = await client.call("runs.events", {"run_id": run_id})
        assert [entry["event"] for entry in page["events"]] == [{"type": "last"}]


SHAPES: dict[str, tuple[str, Any]] = {
    "a number": ("7", None),
    "a string": ('"server.ping"', None),
    "null": ("null", None),
    "true": ("true", None),
    "an empty object": ("{}", None),
    "an empty batch": ("[]", None),
    "no method": ('{"jsonrpc":"2.0","id":1}', 1),
    "no method and no id": ('{"jsonrpc":"2.0"}', None),
    "a method that is null": ('{"jsonrpc":"2.0","id":1,"method":null}', 1),
    "a method that is a number": ('{"jsonrpc":"2.0","id":"1","method":1}', "1"),
    "a method that is an array": ('{"jsonrpc":"2.0","id":1,"method":["server.ping"]}', 1),
    "no version": ('{"id":1,"method":"server.ping"}', 1),
    "the version as a number": ('{"jsonrpc":2.0,"id":1,"method":"server.ping"}', 1),
    "another version": ('{"jsonrpc":"2","id":1,"method":"server.ping"}', 1),
    "params null": (ping(',"params":null'), 1),
    "params a string": (ping(',"params":"x"'), 1),
    "params a number": (ping(',"params":0'), 1),
    "params false": (ping(',"params":false'), 1),
    "params of a notification a string": ('{"jsonrpc":"2.0","method":"server.ping","params":"x"}', None),
    "both request and reply, without a version": ('{"id":1,"method":"server.ping","result":1}', 1),
}


@pytest.mark.parametrize(("text", "id_"), SHAPES.values(), ids=SHAPES.keys())
async def test_json_of_the_wrong_shape_is_an_invalid_request(text: str, id_: Any, served: Daemon) -> None:
    async with peer(served) as client:
        is_error(await client.raw(text), -32600, "invalid_request", id_)
        await alive(client)


@pytest.mark.parametrize(
    "id_", ["0", "-1", f"{BIG}", f"-{BIG}", '""', '"7"', f'"{"x" * 128}"', f'"{"é😀" * 64}"', "null", r'"\"\\\n\u0000"']
)
async def test_an_id_is_echoed_in_its_type(id_: str, served: Daemon) -> None:
    async with peer(served) as client:
        await client.socket.send(ping(id_=id_))
        answer = await client.next_frame()
        echoed = json.loads(answer)["id"]
        assert (echoed, type(echoed)) == (json.loads(id_), type(json.loads(id_)))
        if id_.lstrip("-").isdigit():
            assert answer.startswith(b'{"jsonrpc":"2.0","id":%b,' % id_.encode())


@pytest.mark.parametrize(
    "id_",
    # A number with a fraction or an exponent may be an integer to a mathematician; its echo would not be the same.
    [
        "true",
        "false",
        "1.5",
        "1.0",
        "1e2",
        f"{BIG + 1}",
        f"-{BIG + 1}",
        f"{2**64}",
        "1e300",
        f'"{"x" * 129}"',
        "{}",
        "[]",
    ],
)
async def test_an_id_that_cannot_be_echoed_is_refused_with_a_null_one(id_: str, served: Daemon) -> None:
    async with peer(served) as client:
        error = is_error(await client.raw(ping(id_=id_)), -32600, "invalid_request")
        assert "id" in error["message"]
        is_error((await client.raw(f"[{ping(id_=id_)}]"))[0], -32600, "invalid_request")
        await alive(client)


async def test_a_batch_of_notifications_is_not_answered_and_one_of_nonsense_is_answered_one_by_one(
    served: Daemon,
) -> None:
    async with peer(served) as client:
        await client.socket.send('[{"jsonrpc":"2.0","method":"server.ping"},{"jsonrpc":"2.0","method":"no.such"}]')
        await alive(client)
        answers = await client.raw('[[],1,null,{"jsonrpc":"2.0","id":5},[[]]]')
        assert [answer["id"] for answer in answers] == [None, None, None, 5, None]
        for answer in answers:
            is_error(answer, -32600, "invalid_request", answer["id"])
        await alive(client)


@pytest.mark.parametrize("token", ["auth-token", None])
async def test_replies_to_what_was_never_asked_are_ignored_and_counted(token: str | None, served: Daemon) -> None:
    strays = ['{"jsonrpc":"2.0","id":1,"result":1}', '{"jsonrpc":"2.0","id":"x","error":{"code":1,"message":""}}']
    strays += ['{"id":true,"result":null}', f"[{strays[0]},{strays[1]}]"]
    before = served.metrics()["stray_replies"]
    async with peer(served, token) as client:
        for stray in strays:
            await client.socket.send(stray)
        await client.call("session.auth", {"token": served.token()})
        await alive(client)
    assert served.metrics()["stray_replies"] == before + 5


VIOLATIONS: dict[str, tuple[bytes, int, str]] = {
    "a binary message": (frame(rawpeer.BINARY, b"{}"), 1003, "binary"),
    "text that is not UTF-8": (frame(TEXT, b'{"x":"\xff"}'), 1007, "UTF-8"),
    "a surrogate in UTF-8": (frame(TEXT, b'"\xed\xa0\x80"'), 1007, "UTF-8"),
    "an overlong encoding": (frame(TEXT, b'"\xc0\xaf"'), 1007, "UTF-8"),
    "text that ends within a character": (frame(TEXT, b'"\xc3'), 1007, "UTF-8"),
    "an unmasked frame": (frame(TEXT, b"{}", masked=False), 1002, "mask"),
    "an unmasked ping": (frame(PING, b"", masked=False), 1002, "mask"),
    **{
        f"reserved bits {bits:03b}": (frame(TEXT, b"{}", reserved=bits), 1002, "reserved bits") for bits in (4, 2, 1, 7)
    },
    **{f"opcode {code:#x}": (frame(code, b""), 1002, "reserved opcode") for code in (3, 7, 0xB, 0xF)},
    "a continuation of nothing": (frame(CONTINUATION, b"{}"), 1002, "continuation"),
    "a message within a message": (frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), 1002, "fragmented"),
    "a ping in fragments": (frame(PING, b"", fin=False), 1002, "fragments"),
    "a ping of 126 bytes": (frame(PING, bytes(126)), 1002, "125"),
    "a close frame of one byte": (frame(CLOSE, b"\x03"), 1002, "one byte"),
    "a close code that is not to be sent": (frame(CLOSE, b"\x03\xed"), 1002, "1005"),
    "a close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), 1007, "UTF-8"),
    "a length not in its shortest form": (b"\x81\xfe\x00\x02" + bytes(4) + b"{}", 1002, "shortest"),
}


@pytest.mark.parametrize("token", ["auth-token", None])
@pytest.mark.parametrize(("data", "code", "reason"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_what_breaks_the_protocol_closes_the_connection_with_its_code_and_reason(
    data: bytes, code: int, reason: str, token: str | None, served: Daemon
) -> None:
    async with raw_peer(served, token) as client:
        client.send(data + frame(TEXT, ping().encode()))
        closed = await client.frame()
        assert (closed.opcode, closed.code) == (CLOSE, code)
        assert reason in closed.reason
        client.send(frame(CLOSE, closed.payload[:2]))
        assert await client.rest() == b""  # what came after it is not read


async def test_after_all_that_is_hostile_the_daemon_serves_as_before(served: Daemon) -> None:
    before = served.metrics()["protocol_violations"]
    async with raw_peer(served) as client:
        client.send(frame(TEXT, b"\xff"))
        assert (await client.frame()).code == 1007
    async with peer(served) as client_after:
        await alive(client_after)
    assert served.metrics()["protocol_violations"] == before + 1


async def test_a_message_in_fragments_is_one_message_and_a_ping_among_them_is_answered(served: Daemon) -> None:
    message = '{"jsonrpc":"2.0","id":"é😀","method":"server.ping"}'.encode()
    async with raw_peer(served) as client:
        for cut in range(1, len(message)):
            client.send(frame(TEXT, message[:cut], fin=False) + frame(CONTINUATION, b"", fin=False))
            client.send(frame(PING, b"%d" % cut) + frame(CONTINUATION, message[cut:]))
            # Both answers leave in one write; which is first is not promised.
            got = {frame_.opcode: frame_.payload for frame_ in (await client.frame(), await client.frame())}
            assert got[PONG] == b"%d" % cut
            assert json.loads(got[TEXT])["id"] == "é😀"


async def test_a_message_that_comes_byte_by_byte_is_taken(served: Daemon) -> None:
    async with raw_peer(served) as client:
        for byte in frame(TEXT, ping().encode()):
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)  # so that it leaves alone
        assert (await client.message())["id"] == 1


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(125))])
async def test_a_ping_is_answered_by_a_pong_with_its_payload_before_authentication_too(
    payload: bytes, served: Daemon
) -> None:
    for token in ("auth-token", None):
        async with raw_peer(served, token) as client:
            client.send(frame(PONG, b"that nobody asked for") + frame(PING, payload))
            assert await client.frame() == (PONG, payload)


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x03\xe8bye", b"\x0f\xa0", b"\x03\xf1"])
async def test_a_close_frame_is_answered_with_its_code_and_the_daemon_ends_the_socket(
    payload: bytes, served: Daemon
) -> None:
    async with raw_peer(served) as client:
        client.send(frame(CLOSE, payload) + frame(TEXT, ping().encode()))
        assert await client.frame() == (CLOSE, payload[:2])
        assert await client.rest() == b""


async def test_a_thousand_calls_in_one_write_are_answered_in_their_order(served: Daemon) -> None:
    async with raw_peer(served) as client:
        client.send(b"".join(frame(TEXT, ping(id_=str(n)).encode()) for n in range(1_000)))
        assert [(await client.message())["id"] for _ in range(1_000)] == list(range(1_000))


async def test_every_beginning_of_a_request_is_a_parse_error(served: Daemon) -> None:
    text = ping(',"params":{"a":[1,"\\u00e9",true,null,-0.5e1]}')
    async with peer(served) as client:
        for end in range(len(text)):
            is_error(await client.raw(text[:end]), -32700, "parse_error")
        await alive(client)


async def test_a_batch_mixes_what_is_right_and_what_is_wrong_in_every_order(served: Daemon) -> None:
    parts = {ping(id_='"a"'): "a", ping(id_="1.5"): None, '{"jsonrpc":"2.0","method":"server.ping"}': ..., "3": None}
    async with peer(served) as client:
        for order in itertools.permutations(parts):
            answers = await client.raw(f"[{','.join(order)}]")
            assert sorted(str(answer["id"]) for answer in answers) == ["None", "None", "a"]
        await alive(client)
