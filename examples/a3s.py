"""A real agent: the a3s-code runtime works in a folder, and its own event stream is a run's log, as it happens.

    python examples/a3s.py "What is in this folder?"

README.md says what it needs. `carserver runs watch` shows it, `carserver runs cancel RUN` stops it.
"""

import argparse
import asyncio
import os
from typing import Any

from a3s_code import Agent, PermissionPolicy, SessionOptions

from carserver.client import Run, connect

MODEL = os.environ.get("OPENAI_MODEL", "fake")
CONFIG = f"""
default_model = "openai/{MODEL}"
providers "openai" {{
  api_key  = env("OPENAI_API_KEY")
  base_url = env("OPENAI_BASE_URL")
  models "{MODEL}" {{
    name      = "{MODEL}"
    tool_call = true
  }}
}}
"""


async def main(prompt: str, folder: str) -> Any:
    """One prompt, one run; the runtime's session."""
    options = SessionOptions()
    options.planning_mode = "disabled"
    options.permission_policy = PermissionPolicy(default_decision="allow")  # it may do whatever you may
    session = Agent.create(CONFIG).session(folder, options)
    # The runtime has an `agent_start` and an `agent_end` of its own: the run needs no others.
    async with connect() as car, car.run(prompt, session_id=session.session_id, starts=False) as run:
        print(run.id, flush=True)
        await record(session, prompt, run)
    return session


async def record(session: Any, prompt: str, run: Run) -> None:
    """Records every event of the runtime's, in its own words. A cancelled run stops the runtime, too."""
    number = 0
    try:
        async for event in session.stream(prompt):
            await run.record(in_full(session, event, number))
            number += 1
    finally:
        session.cancel()  # harmless when it has ended


def in_full(session: Any, event: Any, number: int) -> dict[str, Any]:
    """The `number`-th event as the runtime keeps it: but of text, the stream hands out an extract."""
    match event.event_type:
        case "text_delta":
            return {"type": "text_delta", "text": event.text}
        case "tool_output_delta":
            return {"type": "tool_output_delta", "id": event.tool_id, "name": event.tool_name, "delta": event.text}
    kept: dict[str, Any] = session.run_events(session.runs()[-1]["id"])[number]["event"]
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The a3s-code agent runtime, recorded.")
    parser.add_argument("prompt")
    parser.add_argument("--folder", default=".", help="where it works; .")
    given = parser.parse_args()
    asyncio.run(main(given.prompt, given.folder))
