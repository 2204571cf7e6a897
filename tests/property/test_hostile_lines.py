"""Generated lines against a real daemon: each that is not blank is answered in JSON-RPC as often as due, or parsed as
no JSON, whatever stands in them and however the stream is cut; the daemon has no defect and serves as before.
"""

import json
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.daemon import Daemon, running
from tests.property.test_hostile_messages import NotJson, check_reply, due, messages, parsed

EXAMPLES = 150
END = "the end of this example"
LIMIT_S = 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    state = tmp_path_factory.mktemp("hostile") / "state"
    methods = ("--methods", "tests.methods_for_tests")
    with (
        tempfile.TemporaryDirectory() as folder,
        running(state, *methods, unix=f"{folder}/socket", wrong_token_s=1e-6) as one,
    ):
        yield one


def answers(daemon: Daemon, stream: bytes, cuts: list[int]) -> list[bytes]:
    """What a daemon says to a peer that sends this in pieces and then no more; without what is pushed."""
    got = bytearray()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(LIMIT_S)
        peer.connect(str(daemon.settings["unix"]))
        at = 0
        for to in sorted({len(stream), *(place % (len(stream) + 1) for place in cuts)}):
            peer.sendall(stream[at:to])
            at = to
        peer.shutdown(socket.SHUT_WR)
        while data := peer.recv(65_536):
            got += data
    assert not got or got.endswith(b"\n")
    return [line for line in bytes(got).split(b"\n")[:-1] if not line.startswith(b'{"jsonrpc":"2.0","method"')]


def wanted(line: bytes) -> list[list[str]]:
    """The frames that answer a line: of each the ids of its replies, as JSON."""
    if not line.strip(b" \t\r"):
        return []
    try:
        value = parsed(line)
    except NotJson:
        return [["null"]]
    if isinstance(value, list) and value:
        ids = [id_ for call in value for id_ in due(call, set())]
        return [ids] if ids else []
    return [[id_] for id_ in due(value, set())]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.one_of(messages, st.sampled_from([b"", b"\r", b" ", b"\xff\xfe"])), max_size=8),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 2_000), max_size=6),
)
@example(lines=[b'{"jsonrpc":"2.0","id":1,"method":"server.ping","params":{"x":"\xff"}}'], ending=b"\n", cuts=[])
@example(lines=[b'{"jsonrpc":"2.0","id":1,"method":"server.ping"}\r'], ending=b"\r\n", cuts=[3])
def test_whatever_lines_come_each_is_answered_as_often_as_due(
    daemon: Daemon, lines: list[bytes], ending: bytes, cuts: list[int]
) -> None:
    lines = [line.replace(b"\n", b" ") for line in lines]
    lines.append(json.dumps({"jsonrpc": "2.0", "id": END, "method": "server.ping"}).encode())
    frames = [json.loads(line) for line in answers(daemon, ending.join(lines), cuts)]
    got: list[tuple[str, ...]] = []
    for frame in frames:
        replies = frame if isinstance(frame, list) else [frame]
        for reply in replies:
            check_reply(reply)
        got.append(tuple(sorted(json.dumps(reply["id"]) for reply in replies)))
    assert Counter(got) == Counter(tuple(sorted(ids)) for line in lines for ids in wanted(line))
