"""An agent as small as they come: a loop that asks a model (a made up one), runs tools, streams words, and ends.

carserver serve --tools examples/tools.toml
python examples/agent.py "What is left to do?" $PWD/carserver
"""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator

from carserver.client import Car, Run, connect
from carserver.protocol.tools import TextChunk


async def count(text: str) -> AsyncIterator[str]:
    """Counts lines by the name that they begin with."""
    for name, lines in Counter(line.partition(":")[0] for line in text.splitlines()).items():
        yield f"{lines} {name}\n"


def model(folder: str, found: list[str]) -> tuple[str, dict[str, str]] | str:
    """What a model would say: a tool and its arguments, or words."""
    if not found:
        return "grep", {"pattern": "TODO", "folder": folder}  # of the tools file
    if len(found) == 1:
        return "count", {"text": found[0]}  # of this program
    return f"This is left to do:\n{found[1] or 'nothing'}"


async def main(prompt: str, folder: str) -> None:
    """What the model wants is done; what came of it is what the model is asked with next."""
    async with connect() as car, car.run(prompt) as run:
        car.tool(count)
        found: list[str] = []
        while not isinstance(step := model(folder, found), str):
            found.append(await use(car, run, *step))
        for line in step.splitlines(keepends=True):
            await run.text(line)
        run.result = step
    print(run.id, step)


async def use(car: Car, run: Run, tool: str, arguments: dict[str, str]) -> str:
    """Has a tool run, which the run's log will tell, and waits for it: what it wrote."""
    handle = (await car.tools.invoke(tool, parameters=arguments, run_id=run.id)).handle
    text, chunks = "", 0
    while news := await car.tools.poll(handle, wait_ms=30_000, after=chunks):
        text += "".join(chunk.text for chunk in news.chunks if isinstance(chunk, TextChunk))
        chunks += len(news.chunks)
        if news.status != "running":
            break
    return text


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
