"""What docs/car.md tells a user of the CAR client to do, does what it says."""

from pathlib import Path

import pytest

from tests.carclient import car_client, needs_car
from tests.daemon import running
from tests.documents import blocks

DOCUMENT = "docs/car.md"


@needs_car
async def test_the_module_of_the_document_is_all_that_the_clients_agent_loop_needs_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module,) = blocks(DOCUMENT)
    assert module.language == "python"
    (tmp_path / "model.py").write_text(module.text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with running(tmp_path / "state", "--methods", "model") as daemon:
        async with car_client(daemon) as car:
            config = {"agent_name": "Reader", "identity": "Read.", "tool_schemas": [], "policies": [], "max_turns": 2}
            outcome = await car.run_agent(config, "follow the document")
    assert (outcome["status"], outcome["summary"]) == ("success", "put your model here")
