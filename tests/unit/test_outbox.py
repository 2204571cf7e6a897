"""The bounded queue of one peer."""

import pytest

from carserver.core.outbox import Outbox

LIMIT = 100


class Sender:
    """Something whose frames wait; it keeps what it was told."""

    def __init__(self) -> None:
        self.gone: list[tuple[int, int]] = []

    def left(self, events: int, size: int) -> None:
        self.gone.append((events, size))


class Woken:
    """Counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def woken() -> Woken:
    return Woken()


@pytest.fixture
def outbox(woken: Woken) -> Outbox:
    return Outbox(lambda payload: b"<" + payload + b">", LIMIT, woken)


def test_what_is_sent_is_framed_and_comes_out_in_its_order(outbox: Outbox) -> None:
    outbox.send(b"one")
    outbox.put(b"two")
    outbox.send(b"three")
    assert outbox.size == 5 + 3 + 7
    assert outbox.take(1_000) == b"<one>two<three>"
    assert outbox.size == 0
    assert outbox.take(1_000) == b""


def test_whoever_drains_it_is_woken_for_everything_that_enters(outbox: Outbox, woken: Woken) -> None:
    outbox.send(b"one")
    outbox.put(b"two")
    assert woken.times == 2


def test_about_as_much_is_taken_as_was_asked_for_and_a_frame_is_never_cut(outbox: Outbox) -> None:
    for _ in range(4):
        outbox.put(b"x" * 10)
    assert len(outbox.take(11)) == 20
    assert len(outbox.take(1)) == 10
    assert len(outbox.take(1)) == 10
    assert outbox.size == 0


def test_a_single_frame_comes_out_as_the_very_object_that_entered(outbox: Outbox) -> None:
    frames = b"x" * 1_000
    outbox.put(frames)
    assert outbox.take(1) is frames


@pytest.mark.parametrize("others", [0, 1])
def test_a_sender_is_told_what_of_it_has_left(outbox: Outbox, others: int) -> None:
    sender = Sender()
    outbox.put(b"x" * 30, sender, 3)
    for _ in range(others):
        outbox.put(b"y" * 5)
    assert sender.gone == []
    outbox.take(30)
    assert sender.gone == [(3, 30)]


def test_a_frame_may_wait_where_there_is_room_or_nothing_else_waits(outbox: Outbox) -> None:
    assert outbox.has_room(LIMIT * 10), "one larger frame keeps things moving"
    outbox.put(b"x" * 60)
    assert outbox.has_room(40)
    assert not outbox.has_room(41)
    outbox.put(b"x" * 40)
    assert outbox.full
    assert not outbox.has_room(1)


def test_a_reply_always_enters(outbox: Outbox) -> None:
    outbox.put(b"x" * LIMIT)
    outbox.send(b"reply")
    assert outbox.size == LIMIT + 7


@pytest.mark.parametrize(("size", "low", "full"), [(0, 1, 0), (25, 1, 0), (26, 0, 0), (99, 0, 0), (100, 0, 1)])
def test_full_and_low_have_room_between_them(outbox: Outbox, size: int, low: bool, full: bool) -> None:
    outbox.put(b"x" * size)
    assert (outbox.low, outbox.full) == (low, full)


def test_room_that_is_reserved_for_answers_makes_it_full_but_is_no_frame(outbox: Outbox) -> None:
    outbox.put(b"x" * 20)
    outbox.reserved += 80
    assert outbox.full
    assert outbox.low
    assert outbox.has_room(80)
    outbox.reserved -= 1
    assert not outbox.full


def test_relief_comes_once_when_something_was_taken_and_little_is_left(outbox: Outbox) -> None:
    relieved: list[str] = []
    for size in (30, 40, 20, 5):
        outbox.put(b"x" * size)
    outbox.when_low(lambda: relieved.append("first"))
    outbox.when_low(lambda: relieved.append("second"))
    outbox.take(1)
    assert relieved == [], "65 are left, 25 are little"
    outbox.take(1)
    assert relieved == ["first", "second"]
    outbox.take(1)
    assert relieved == ["first", "second"]


def test_who_asks_again_while_being_relieved_waits_for_the_next_time(outbox: Outbox) -> None:
    relieved: list[int] = []

    def again() -> None:
        relieved.append(outbox.size)
        outbox.when_low(again)

    outbox.put(b"x" * 10)
    outbox.put(b"x" * 5)
    outbox.when_low(again)
    outbox.take(1)
    assert relieved == [5]
    outbox.take(1)
    assert relieved == [5, 0]


def test_what_relief_puts_in_is_there_for_the_next_take(outbox: Outbox) -> None:
    outbox.put(b"x")
    outbox.when_low(lambda: outbox.put(b"more"))
    assert outbox.take(100) == b"x"
    assert outbox.take(100) == b"more"


def test_after_its_last_frame_nothing_enters(outbox: Outbox, woken: Woken) -> None:
    outbox.put(b"before")
    outbox.seal(b"last")
    outbox.put(b"after")
    outbox.send(b"after")
    outbox.seal(b"another")
    assert woken.times == 2
    assert outbox.sealed
    assert outbox.take(100) == b"beforelast"
    assert outbox.take(100) == b""


def test_a_sealed_outbox_is_never_low_so_that_no_page_is_read_for_a_peer_that_goes(outbox: Outbox) -> None:
    outbox.seal()
    assert not outbox.low


def test_a_discarded_outbox_holds_nothing_and_calls_nobody(outbox: Outbox) -> None:
    sender = Sender()
    outbox.put(b"x" * 10, sender, 1)
    outbox.when_low(lambda: pytest.fail("the peer is gone"))
    outbox.discard()
    assert (outbox.size, outbox.sealed) == (0, True)
    outbox.put(b"more", sender, 1)
    assert outbox.take(100) == b""
    assert sender.gone == []
