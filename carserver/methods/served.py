"""All of what is served: the modules whose methods stand in the daemon's table, in the order of the documents."""

from types import ModuleType

from carserver.methods import (
    hosting,
    outputs,
    runs,
    server,
    session,
    toolbox,
    tools,
    toolstream,
    trace,
    transfer,
    watch,
)
from carserver.methods.car import cancel, host, opening, proposals
from carserver.methods.car import runs as car_runs
from carserver.methods.car import tools as car_tools
from carserver.methods.car import trace as car_trace

METHOD_MODULES: tuple[ModuleType, ...] = (
    *(session, runs, trace, watch, toolbox, tools, toolstream, hosting),
    *(outputs, transfer, server),
    *(opening, car_runs, car_trace, cancel, car_tools, proposals, host),
)
