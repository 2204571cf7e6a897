"""A cache bounded by entries and by bytes; the least recently used goes first."""

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SizedCache(Generic[K, V]):
    """Keeps values by key. What it drops can be read again from where it came."""

    __slots__ = ("_bytes", "_entries", "_maximum_bytes", "_maximum_entries")

    def __init__(self, entries: int, bytes_: int) -> None:
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._maximum_entries = entries
        self._maximum_bytes = bytes_
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, now the most recently used; None if it is not here."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keeps `value`, of about `size` bytes."""
        self.pop(key)
        self._entries[key] = (value, size)
        self._bytes += size
        while len(self._entries) > self._maximum_entries or self._bytes > self._maximum_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._bytes -= dropped

    def pop(self, key: K) -> V | None:
        """Takes the value out."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._bytes -= entry[1]
        return entry[0]

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self._bytes = 0
