"""`carserver health`: is the daemon there, and does it take work? For a person, a container, a service manager."""

import http.client
from urllib.parse import urlsplit

import click

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import data
from carserver.cli.plain import clipped, visible

_CHECKS = (("/healthz", "not healthy"), ("/readyz", "not ready"))


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="SECONDS",
    help="For each of its two checks. [5]",
)
@daemon_options
def health(*, timeout: float, state_dir: str | None, url: str | None) -> int:
    """Ask the daemon whether it is well and takes work.

    Prints ok (exit code 0), or what is wrong (1; 69 where it cannot be reached).
    """
    address = Daemon(state_dir, url).url()
    for path, otherwise in _CHECKS:
        status, text = _get(address, path, timeout)
        if status != http.client.OK:
            told = visible(clipped(text.removeprefix(f"{otherwise}: "), 200))
            data(f"{otherwise}: {told or status}")
            return ExitCode.RUNTIME
    data("ok")
    return ExitCode.OK


def _get(url: str, path: str, timeout: float) -> tuple[int, str]:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "wss" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        try:
            connection.connect()
        except OSError as error:
            why = (error.strerror or str(error) or type(error).__name__).lower()
            message = f"cannot connect to {url}: {why}; is the daemon running?"
            raise CommandError(message, ExitCode.UNREACHABLE) from None
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(4_096).decode("utf-8", "replace").strip()
    except TimeoutError:
        raise CommandError(f"{path} was not answered within {timeout:g} s", ExitCode.TIMED_OUT) from None
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{path} was not answered: {type(error).__name__}"
    finally:
        connection.close()
