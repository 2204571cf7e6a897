"""Methods of somebody who takes standard output for his own, and likes his JSON spread: `serve --methods`."""

import json
import os
import subprocess
import sys

from carserver.rpc.method import Encoded, method
from carserver.rpc.session import Session

NOISE = "not a frame"

if "--stdio" in sys.argv:  # else the tests wait for its first line
    print(NOISE)


@method("test.print")
def print_(session: Session) -> str:
    """Prints in every way there is, and reads standard input."""
    print(NOISE, flush=True)
    os.write(1, f"{NOISE}\n".encode())
    subprocess.run(["echo", NOISE], check=True)
    return sys.stdin.read()


@method("test.indented")
def indented(session: Session) -> Encoded[dict[str, list[int]]]:
    """A result on several lines."""
    return Encoded(json.dumps({"members": [1, 2]}, indent=2).encode())
