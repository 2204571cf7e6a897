"""A run's view as lines of text: for a screen of a given size, and the record that stays when the view ends.

Colour repeats what a word or a sign says already, and is one of the terminal's own sixteen, which its owner has chosen
to be readable on its background. What agents wrote is made visible here, on its way into a `Text`; nothing is markup.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from carserver.cli.output import counted, duration
from carserver.cli.plain import clipped, visible, visible_lines
from carserver.cli.view_model import RunModel
from carserver.cli.view_tree import Kind, Node, State, Writing
from carserver.cli.view_words import arguments

_SPINNER_MS = 100  # a frame of it
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_STILL = "▸"  # the same, where nothing moves
_BAR_CELLS = 16
_TITLE_CHARACTERS = 40
_BESIDE_COLUMNS = 120  # from here on the text stands beside the tree
_SEPARATORS = 7  # cells of a tool's line, around what it was given and what came of it
_NARROW_COLUMNS = 60  # below, a line has its name and its time, and why it failed
_ID_COLUMNS = 76  # from here on there is room for the run's id
_TREE_COLUMNS = 110  # a wider tree is hard to read across
_RULES_LINES = 12  # from here on there is room for rules, and for the goal
_FOOTER_LINES = 8
_AHEAD = 3  # lines of what is still to come, below what is under way
_RECORD_LINES = 40  # of the tree
_LATEST_LINES = 12  # of it, where it is longer even without its branches
_RESULT_LINES = 100
_TEXT_LINES = 12  # of the record, where there is no result
_DEPTH = 3  # section, turn, tool

STATUS_STYLES = {
    "completed": "bold green",
    "failed": "bold red",
    "cancelled": "bold yellow",
    "interrupted": "bold yellow",
}
LIVE_STYLE = "bold cyan"
_SIGNS = {
    State.PENDING: ("○", "dim"),
    State.DONE: ("✓", "green"),
    State.FAILED: ("✗", "red"),
    State.SKIPPED: ("-", "dim"),
}
_STATUS_SIGNS = {"completed": "✓", "failed": "✗", "cancelled": "■", "interrupted": "■"}
_TITLES = {Kind.TOOL: "cyan", Kind.CALL: "dim", Kind.NOTE: "dim", Kind.TURN: "", Kind.SPAN: ""}  # the sections: bold
_DIM = frozenset({Kind.TOOL, Kind.CALL, Kind.NOTE})

# Wraps, and makes escape sequences of styles; nothing is ever written to it.
_console = Console(
    width=1_000, force_terminal=True, color_system="standard", highlight=False, markup=False, emoji=False
)


class Line(NamedTuple):
    """A line of the tree: a node, or a count of what was folded."""

    depth: int
    node: Node | None
    folded: Counter[str]


def ansi(lines: list[Text]) -> list[str]:
    """Lines as a terminal takes them; each ends in its default colours."""
    written = []
    for line in lines:
        with _console.capture() as captured:
            _console.print(line, end="", soft_wrap=True)
        written.append(captured.get())
    return written


def screen(model: RunModel, width: int, height: int, now_ms: int, trouble: str = "") -> list[Text]:
    """The view: `height` lines of at most `width` cells.

    Args:
        model: the run.
        width: columns.
        height: lines.
        now_ms: the time, for what is still going on.
        trouble: why nothing comes, where that is so.
    """
    header = _header(model, width, now_ms)[: max(height - 2, 1)]
    rules = height >= _RULES_LINES
    if rules and (goal := _goal(model, width)) is not None:
        header.append(goal)
    footer = [_footer(model, width, trouble)] if height >= _FOOTER_LINES or trouble else []
    room = max(height - len(header) - len(footer), 0)
    body: list[Text] = []
    if rules:
        beside = width >= _BESIDE_COLUMNS and bool(model.writing.passages)
        body = _beside(model, width, room, now_ms) if beside else _stacked(model, width, room, now_ms)
    elif room:
        text = wrapped(model.writing, width, min(2, room // 2))
        body = [*_tree(model, width, room - len(text), now_ms), *text]
    body = body[:room]
    return [*header, *body, *[Text()] * (room - len(body)), *footer][:height]


def _stacked(model: RunModel, width: int, room: int, now_ms: int) -> list[Text]:
    text = wrapped(model.writing, width, room - 1)
    lines = [_rule(width)]
    available = room - 1 - bool(text)
    tree = _tree(model, width, max(available - len(text), available * 3 // 5), now_ms)
    lines += tree
    if text:
        lines += [_rule(width, _text_title(model.writing)), *text[-max(available - len(tree), 1) :]]
    return lines


def _beside(model: RunModel, width: int, room: int, now_ms: int) -> list[Text]:
    left = min(width * 11 // 20, _TREE_COLUMNS)
    tree = _tree(model, left, room - 1, now_ms)
    text = wrapped(model.writing, width - left - 3, room - 1)
    lines = [Text.assemble(_rule(left + 1), ("┬", "dim"), _rule(width - left - 2, _text_title(model.writing)))]
    for n in range(room - 1):
        line = tree[n].copy() if n < len(tree) else Text()
        line.truncate(left, pad=True)
        lines.append(Text.assemble(line, (" │ ", "dim"), text[n] if n < len(text) else ""))
    return lines


# ------------------------------------------------------------------------------------------------------ the whole run


def _header(model: RunModel, width: int, now_ms: int, *, still: bool = False) -> list[Text]:
    sign = _STATUS_SIGNS.get(model.status) or (_STILL if still else spinner(now_ms))
    style = STATUS_STYLES.get(model.status, LIVE_STYLE)
    prompt = visible(clipped(model.prompt.strip(), 2 * width).replace("\n", " "))
    left = Text.assemble((f"{sign} {visible(model.status)}", style), "  ", (prompt, "bold"))
    right = Text(duration(model.elapsed_ms(now_ms)), "bold")
    return [fit(left, right, width), fit(Text(facts(model), "dim"), Text(), width)]


def facts(model: RunModel) -> str:
    """The run in figures, and whose it is."""
    counts, tokens = model.tree.counts, model.tokens
    told = [counted(model.cursor, "event") + (f" (from {model.first + 1:,} on)" if model.first else "")]
    told += [counted(counts[kind], kind) for kind in (Kind.STEP, Kind.TURN, Kind.TOOL) if counts[kind]]
    if counts["failed"]:
        told[-1] += f" ({counts['failed']:,} failed)"
    told += [str(tokens)] if tokens.total else []
    told += [f"agent {visible(model.agent_id)}"] if model.agent_id else []
    told += [f"session {visible(model.session_id)}"] if model.session_id else []
    return " · ".join(told)


def _goal(model: RunModel, width: int) -> Text | None:
    steps = [node for node in model.tree.root.children if node.kind is Kind.STEP]
    fraction = model.fraction
    if fraction is None and steps and not model.tree.root.folded[Kind.STEP]:
        fraction = sum(not node.open for node in steps) / len(steps)
    if fraction is None and not model.goal:
        return None
    left = Text.assemble(("goal ", "dim"), visible(model.goal)) if model.goal else Text("steps", "dim")
    return fit(left, bar(fraction, width, model.over), width)


def _footer(model: RunModel, width: int, trouble: str) -> Text:
    if trouble:
        return fit(Text(visible(trouble), "yellow"), Text(), width)
    behind = model.known_cursor - model.cursor
    if behind > 0:
        left = Text(f"reading the log: {model.cursor:,} of {model.known_cursor:,} events", "dim")
        return fit(left, bar(model.cursor / model.known_cursor, width), width)
    id_ = Text(visible(clipped(model.run_id, width)) if width >= _ID_COLUMNS else "", "dim")
    return fit(Text("Ctrl-C ends the view, not the run", "dim"), id_, width)


def _rule(width: int, title: str = "") -> Text:
    return Text(("─ " + title + " " if title else "").ljust(width, "─")[:width], "dim")


# --------------------------------------------------------------------------------------------------------- the tree


def _tree(model: RunModel, width: int, room: int, now_ms: int) -> list[Text]:
    """The part of the tree that what happens now is in."""
    width = min(width, _TREE_COLUMNS)
    lines = list(_flat(model.tree.root, _DEPTH))
    active = max(
        (n for n, line in enumerate(lines) if line.node is None or line.node.state is not State.PENDING), default=0
    )
    end = min(active + 1 + min(_AHEAD, room // 3), len(lines)) if len(lines) > room else len(lines)
    begin = max(end - room, 0)
    shown = [line_of(line, width, now_ms, model.over) for line in lines[begin:end]]
    if not lines and not model.writing.passages:
        return [Text("no events yet" if not model.over else "no events", "dim")]
    if begin and shown:
        shown[0] = _above(model, begin + 1)
    return shown


def _above(model: RunModel, lines: int) -> Text:
    folded = model.tree.root.folded
    return Text(f"⋮ {lines:,} lines above" + (f", and {_folded(folded)}" if sum(folded.values()) else ""), "dim")


def _flat(node: Node, depth: int, indent: int = 0) -> Iterator[Line]:
    """What is below a node, down to `depth` levels."""
    if sum(node.folded.values()):
        yield Line(indent, None, node.folded)
    for child in node.children:
        yield Line(indent, child, child.folded)
        if depth > 1:
            yield from _flat(child, depth - 1, indent + 1)


def line_of(line: Line, width: int, now_ms: int, over: bool, *, still: bool = False) -> Text:
    """One line of the tree; `still` where it is not painted anew, `over` where nothing in it goes on."""
    indent = "  " * line.depth
    node = line.node
    if node is None:
        return fit(Text(f"{indent}… {_folded(line.folded)} folded", "dim"), Text(), width)
    sign, style = _sign(node, _STILL if still else spinner(now_ms), over)
    title = visible(clipped(node.title, _TITLE_CHARACTERS))
    left = Text.assemble(indent, (sign, style), " ", (title, _TITLES.get(node.kind, "bold")))
    wide = width >= _NARROW_COLUMNS
    if node.events > 1:
        left.append(f" (the latest of {node.events:,})", "dim")
    if node.remark:
        left.append(f"  {visible(clipped(node.remark, width))}", "red" if node.state is State.FAILED else "")
    measures = _measures(node, width, now_ms, over)
    said = node.output.rstrip().replace("\r", "\n").rpartition("\n")[2].replace("\t", " ").strip()  # \r: progress
    failed = node.state is State.FAILED
    came_to = Text(visible(clipped(said, width)) if wide or failed else "", "red" if failed else "dim")
    if detail := node.detail or arguments(node.input):
        given = Text(visible(clipped(detail, width)), "dim" if node.kind in _DIM else "")
        if came_to:  # that, above all why it failed, is not pushed out by what it was given
            room = width - left.cell_len - measures.cell_len - came_to.cell_len - _SEPARATORS
            room = max(room, width // 3) if wide or node.kind is Kind.TURN else room  # of a turn it names the tool
            given.truncate(max(room, 0), overflow="ellipsis" if room > 1 else "crop")
        left.append_text(given and Text("  ").append_text(given))
    if node.exit_code:
        left.append(f"  exit code {visible(clipped(str(node.exit_code), 12))}", "red")
    if came_to:
        left.append("  → ", came_to.style).append_text(came_to)
    if node.cut and wide:
        left.append("  (more was not recorded)", "dim")
    return fit(left, measures, width)


def _measures(node: Node, width: int, now_ms: int, over: bool) -> Text:
    """What stands at the right of a line: how far it is, what it used, how long it took."""
    told = Text()
    if node.kind is Kind.NOTE or node.open:
        told.append_text(bar(node.fraction, width, over))
    if node.tokens is not None and node.tokens.total and width >= _NARROW_COLUMNS:
        told.append(f"{node.tokens.total:,} tokens", "dim")
    running = node.running and not over
    until = now_ms if running else node.finished_ms
    if node.started_ms is not None and until is not None and until > node.started_ms and node.kind is not Kind.NOTE:
        told.append(f"{duration(until - node.started_ms):>8}", "" if running else "dim")
    return told


def _sign(node: Node, running: str, over: bool) -> tuple[str, str]:
    if node.kind is Kind.NOTE:
        return "·", "dim"
    if node.kind is Kind.CALL:
        return "→", "dim"
    if node.state is State.FAILED or not node.running:
        return _SIGNS[node.state]
    return ("■", "yellow") if over else (running, "cyan")  # the former: it never ended


def _folded(folded: Counter[str]) -> str:
    told = [counted(folded[kind], kind) for kind in Kind if folded[kind]]
    if folded["failed"]:
        told.append(f"{folded['failed']:,} of them failed")
    return ", ".join(told)


# --------------------------------------------------------------------------------------------------------- the text


def _text_title(writing: Writing) -> str:
    return f"text, after {writing.cut:,} characters more" if writing.cut else "text"


def wrapped(writing: Writing, width: int, most: int) -> list[Text]:
    """The last lines of the text, wrapped; other kinds than plain text are dim."""
    lines: list[Text] = []
    for passage in reversed(writing.passages):
        if len(lines) >= most:
            break
        end = visible_lines(passage.text[-most * width :]).removesuffix("\n").expandtabs(4)
        style = "" if passage.kind == "text" else "dim"
        of_passage: list[Text] = []
        for line in end.split("\n")[-most:]:
            of_passage += Text(line, style).wrap(_console, max(width, 2), overflow="fold")
        lines = of_passage + lines
    return lines[max(len(lines) - most, 0) :]


# ------------------------------------------------------------------------------------------------------- the record


def record(model: RunModel, width: int, now_ms: int) -> list[Text]:
    """What stays in the terminal when the view ends: the tree in short, the result, the figures.

    The text of the result is not wrapped: a terminal does that itself, and it can be copied.
    """
    width = min(width, _TREE_COLUMNS)
    lines = _header(model, width, now_ms, still=True)
    lines.append(Text(visible(model.run_id), "dim"))
    if model.first:
        lines.append(Text(f"the first {model.first:,} events are not shown here (--cursor 0 shows all)", "dim"))
    trees = (list(_flat(model.tree.root, depth)) for depth in range(_DEPTH, 0, -1))
    tree = next((one for one in trees if len(one) <= _RECORD_LINES), list(_flat(model.tree.root, 1)))
    if len(tree) > _RECORD_LINES:  # many lines of one level tell little: the latest do
        lines.append(_above(model, len(tree) - _LATEST_LINES))
        tree = tree[-_LATEST_LINES:]
    lines += [line_of(line, width, now_ms, model.over, still=True) for line in tree]
    if model.reason:
        lines.append(Text(f"{visible(model.status)}: {visible(clipped(model.reason, 400))}", "yellow"))
    text = model.error or model.result_text
    if text:
        said = visible_lines(text).rstrip("\n").split("\n")
        lines.append(_rule(width, "error" if model.error else "result"))
        lines += [Text(line, "red" if model.error else "") for line in said[:_RESULT_LINES]]
        if len(said) > _RESULT_LINES:
            lines.append(
                Text(f"… {len(said) - _RESULT_LINES:,} more lines: carserver runs get {visible(model.run_id)}", "dim")
            )
    elif model.writing.passages:
        lines += [_rule(width, _text_title(model.writing)), *wrapped(model.writing, width, _TEXT_LINES)]
    if model.outcome is not None:
        lines.append(_rule(width, f"outcome: {visible(clipped(model.outcome.status, _TITLE_CHARACTERS))}"))
        lines += [Text.assemble((f"{visible(name)}: ", "dim"), visible(said)) for name, said in model.outcome.lines]
    if not model.over:
        lines.append(Text(f"the view ended here, the run goes on: carserver runs trace {visible(model.run_id)}", "dim"))
    return lines


# ------------------------------------------------------------------------------------------------------- small things


def bar(fraction: float | None, width: int, over: bool = False) -> Text:
    """How much is done: a bar where there is room for one, and in per cent."""
    if fraction is None:
        return Text()
    cells = _BAR_CELLS if width >= _NARROW_COLUMNS else 0
    done = int(fraction * cells)
    style = "green" if fraction >= 1 else "dim" if over else "cyan"
    return Text.assemble(("━" * done, style), ("─" * (cells - done), "dim"), f" {int(fraction * 100):>3} %")


def spinner(now_ms: int) -> str:
    """The sign of what goes on, at this time."""
    return _SPINNER[now_ms // _SPINNER_MS % len(_SPINNER)]


def fit(left: Text, right: Text, width: int) -> Text:
    """Both on one line; where they do not fit, the left one is cut."""
    room = max(width - right.cell_len - bool(right), 0)
    left.truncate(room, overflow="ellipsis", pad=bool(right))
    line = Text.assemble(left, " ", right) if right else left
    line.truncate(width, overflow="crop")
    return line
