"""The parts of a run's model that grow with it, bounded: the tree of what it did, and the end of what it wrote.

Finished branches, the oldest first, are folded into counts, and the beginning of a long text goes. What was folded or
cut is counted, so that the view can say so.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum

from carserver.cli.view_words import Tokens

NODES = 1_000  # of a tree; beyond it a quarter is folded at once, so that folding costs little for each event
TEXT_CHARACTERS = 16 * 1024  # the end of what the agent wrote, at least
INPUT_CHARACTERS = 2_048  # of a tool's arguments: enough to read them as JSON, most of the time
OUTPUT_CHARACTERS = 400  # the end of a tool's output
NEAR = 20  # of many children only so many, the latest, are looked at for what is under way


class Kind(StrEnum):
    """What a line of the tree is."""

    PLANNING = "planning"
    STEP = "step"
    VERIFICATION = "verification"
    TURN = "turn"
    TOOL = "tool"
    CALL = "call"  # of a tool: a model asked for it, and what came of it is told elsewhere, if at all
    SPAN = "span"  # of an unknown kind: it had a start, and may have an end
    NOTE = "note"  # events of unknown types in a row, the latest shown


class State(StrEnum):
    """How far it is."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(slots=True, eq=False)
class Node:
    """A line of the tree, and what is below it. Its texts came from agents: they are clipped, not made visible."""

    kind: Kind
    title: str
    state: State = State.RUNNING
    detail: str = ""
    remark: str = ""  # what is said of it before its detail: that it was refused
    key: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    fraction: float | None = None  # of its work, where the events tell; 0 to 1
    tokens: Tokens | None = None
    events: int = 1  # of a note: how many it stands for
    input: str = ""  # a tool's arguments as they come, JSON in most cases
    output: str = ""  # the end of what a tool wrote
    exit_code: int | None = None  # where it is a failure
    cut: bool = False  # there was more output than what was recorded
    children: "list[Node]" = field(default_factory=list)
    folded: Counter[str] = field(default_factory=Counter)  # children that are not kept any more, by kind; and `failed`

    @property
    def open(self) -> bool:
        """Whether its end is still to come."""
        return self.state in {State.PENDING, State.RUNNING}

    @property
    def running(self) -> bool:
        """Whether it, or something below it, is under way: a turn ends before the tools that it called."""
        return self.state is State.RUNNING or any(child.state is State.RUNNING for child in self.children[-NEAR:])

    @property
    def finished_ms(self) -> int | None:
        """When it ended, with what is below it; None where nobody said so."""
        ends = [child.ended_ms for child in self.children[-NEAR:] if child.ended_ms is not None]
        return None if self.ended_ms is None else max([self.ended_ms, *ends])

    def end(self, state: State, at_ms: int | None) -> None:
        """It is over; the first end counts."""
        if self.open:
            self.state, self.ended_ms = state, at_ms

    def write(self, piece: str) -> None:
        """More of its output."""
        self.output = end_of(self.output + piece[-OUTPUT_CHARACTERS - 1 :])


def end_of(output: str) -> str:
    """The end of a tool's output, with an ellipsis before it where that is not all."""
    return output if len(output) <= OUTPUT_CHARACTERS else "…" + output[1 - OUTPUT_CHARACTERS :]


class Tree:
    """At most NODES nodes below `root`, and a little; the tools and steps among them are found by their ids."""

    def __init__(self) -> None:
        self.root = Node(Kind.SPAN, "")
        self.tools: dict[str, Node] = {}
        self.steps: dict[str, Node] = {}
        self.counts: Counter[str] = Counter()  # nodes ever made, by kind
        self._size = 0

    def add(self, parent: Node, node: Node, *path: Node | None) -> Node:
        """Puts a node below `parent`, and makes room where there is none; `path` is what is under way, and stays."""
        parent.children.append(node)
        index = {Kind.TOOL: self.tools, Kind.STEP: self.steps}.get(node.kind)
        if index is not None and node.key:
            index[node.key] = node
        self.counts[node.kind] += 1
        self._size += 1
        if self._size > NODES:
            self._fold({id(one) for one in (node, parent, *path)}, (self.root, *path, parent))
        return node

    def _fold(self, kept: set[int], parents: tuple[Node | None, ...]) -> None:
        """What is below finished branches goes first, then the oldest lines."""
        goal = NODES * 3 // 4
        for section in self.root.children:
            for branch in (*section.children, section):
                if id(branch) not in kept and self._size > goal:
                    self._drop(branch, len(branch.children), kept)
        for parent in parents:
            if parent is not None and self._size > goal:
                self._drop(parent, self._size - goal, kept)

    def _drop(self, parent: Node, most: int, kept: set[int]) -> None:
        """Folds up to `most` of the oldest children."""
        going = [node for node in parent.children if id(node) not in kept][:most]
        gone = {id(node) for node in going}
        parent.children = [node for node in parent.children if id(node) not in gone]
        for node in going:
            self._forget(node, parent.folded)

    def _forget(self, node: Node, folded: Counter[str]) -> None:
        folded[node.kind] += node.events
        folded["failed"] += node.state is State.FAILED
        folded.update(node.folded)
        self._size -= 1
        for index in (self.tools, self.steps):
            if index.get(node.key) is node:
                del index[node.key]
        for child in node.children:
            self._forget(child, folded)


@dataclass(slots=True)
class Passage:
    """Text of one kind (`text`, `reasoning`, …), as it streamed in."""

    kind: str
    text: str


class Writing:
    """The end of what the agent wrote."""

    def __init__(self) -> None:
        self.passages: deque[Passage] = deque()
        self.cut = 0  # characters that are not kept any more
        self._size = 0

    def write(self, kind: str, piece: str) -> None:
        """Appends; of a very long text the beginning goes."""
        if not piece:
            return
        if self.passages and self.passages[-1].kind == kind:
            self.passages[-1].text += piece
        else:
            self.break_line()
            self.passages.append(Passage(kind, piece))
        self._size += len(piece)
        if self._size > 2 * TEXT_CHARACTERS:
            self._shorten()

    def break_line(self) -> None:
        """What follows is of another turn or kind: it begins on a line of its own."""
        if self.passages and not self.passages[-1].text.endswith("\n"):
            self.passages[-1].text += "\n"
            self._size += 1

    def _shorten(self) -> None:
        excess = self._size - TEXT_CHARACTERS
        self.cut += excess
        self._size -= excess
        while excess >= len(self.passages[0].text):
            excess -= len(self.passages.popleft().text)
        self.passages[0].text = self.passages[0].text[excess:]
