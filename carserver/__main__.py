"""`python -m carserver` is `carserver`."""

from carserver.cli.app import main

main()
