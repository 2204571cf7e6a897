"""The picture behind scripts/picture: the very lines that `carserver runs trace` paints, as an SVG; always the same."""

import io
import re
import sys
from pathlib import Path

import msgspec
from demo import LENGTHS_S, LOGS, pauses
from rich.console import Console

from carserver.cli.view import screen
from carserver.cli.view_model import RunModel
from carserver.client import Traced
from carserver.protocol.runs import Snapshot, Status

NAME = "tools"
EVENTS = 35  # of the log: its last turn is writing
COLUMNS, LINES = 92, 15
FONTS = (
    "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"  # what the reader has: none is fetched
)


def main() -> None:
    """Writes the picture to the path that is given."""
    log = msgspec.json.decode(LOGS.read_bytes())[NAME][0]
    began_ms = log["snapshot"]["created_at_ms"]
    run = msgspec.convert({**log["snapshot"], "agent_id": NAME, "epoch": "", "event_count": 0}, Snapshot)
    model = RunModel(run)
    now_ms = began_ms
    for entry, pause in zip(log["events"][:EVENTS], pauses(log, LENGTHS_S[NAME]), strict=False):
        now_ms += int(pause * 1000)
        model.take(
            Traced(
                run_id=run.id,
                agent_id=NAME,
                record={"record": "event", **entry, "timestamp_ms": now_ms},
                cursor=entry["sequence"] + 1,
                status="in_progress",
                run_status=Status.EXECUTING,
            )
        )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard")
    for line in screen(model, COLUMNS, LINES, now_ms):
        console.print(line, soft_wrap=True)
    svg = console.export_svg(title="carserver runs trace", unique_id="trace")
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"Fira Code, monospace", FONTS, svg)
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
