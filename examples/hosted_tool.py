"""Tools of a program, by a decorator: offered for as long as it runs, again after each restart of the daemon.

python examples/hosted_tool.py
carserver tools invoke count --set to=20
carserver tools invoke digest --set path=/etc/hostname
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from carserver.client import Progress, Result, connect, progress

PIECE_BYTES = 1024 * 1024

car = connect()


@car.tool
async def count(
    to: Annotated[int, Meta(ge=1, description="The last number.")], pause_s: float = 0.5
) -> AsyncIterator[str | Progress | Result]:
    """Counts aloud."""
    try:
        for n in range(1, to + 1):
            yield f"{n}\n"
            yield Progress(n / to)
            await asyncio.sleep(pause_s)
        yield Result({"counted_to": to})
    except asyncio.CancelledError:
        print("stopped counting", flush=True)
        raise


@car.tool(idempotent=True)
def digest(path: Annotated[str, Meta(description="A file's path.")]) -> str:
    """The SHA-256 of a file."""
    file, digest = Path(path), hashlib.sha256()
    size, done = file.stat().st_size, 0
    with file.open("rb") as opened:  # this blocks, so it is a plain function: it runs in a thread
        while piece := opened.read(PIECE_BYTES):
            digest.update(piece)
            done += len(piece)
            progress(min(done / size, 1))
    return digest.hexdigest()


async def main() -> None:
    """Hosts them until it is stopped."""
    async with car:
        print("hosting count and digest", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
