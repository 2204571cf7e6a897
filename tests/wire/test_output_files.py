"""Outputs that are files, over the socket: only a plain file below the root is served (contract, section 8)."""

import asyncio
import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted
from tests.outputs import append, file_ref, final, params, read, read_whole, refused
from tests.peer import peer

MIB = 1024 * 1024


async def test_a_binary_file_comes_as_base64_and_a_text_as_text(served: Daemon, root: Path) -> None:
    binary, text = os.urandom(3 * MIB + 5) + b"\xff", ("é" * 700_000 + "z").encode()
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/er/binary").write_bytes(binary)
    (root / "text").write_bytes(text)
    async with peer(served) as client:
        first = await append(client, final(file_ref("deep/er/binary", size_hint=1)))
        second = await append(client, {"type": "artifact", "name": "n", "content": file_ref("text")})
        part = await read(client, first, offset=2, length=4)
        assert (base64.b64decode(part["data"]), part["encoding"], part["eof"]) == (binary[2:6], "base64", False)
        assert await read_whole(client, first, MIB) == binary
        part = await read(client, second, length=3)
        assert (part["data"], part["encoding"], part["size"]) == ("é", "utf8", len(text))
        assert await read_whole(client, second, MIB - 1) == text
        error = await refused(client, "outputs.read", {"id": second, "offset": 3})
        assert error.data["path"] == "offset"
        end = await read(client, first, offset=len(binary))
        assert (end["data"], end["eof"]) == ("", True)
    figures = await asyncio.to_thread(served.metrics)
    assert figures["file_bytes_read"] >= 2 * (len(binary) + len(text))
    assert figures["files_waiting"] == 0


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes a device, and not in every container")


SHAPES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "above": ("../outside", lambda _: None),
    "absolute": ("/etc/hostname", lambda _: None),
    "link": ("link", lambda root: (root / "link").symlink_to("../outside")),
    "link-on-the-way": ("link-folder/f", lambda root: (root / "link-folder").symlink_to("plain")),
    "hard-link": ("hard", lambda root: (root / "hard").hardlink_to(root.with_name("outside"))),
    "fifo": ("fifo", lambda root: os.mkfifo(root / "fifo")),
    "device": ("device", lambda root: _device(root / "device")),
    "folder": ("plain", lambda _: None),
    "nothing": ("plain/g", lambda _: None),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_is_no_plain_file_below_the_root_is_refused_and_nothing_stored(
    served: Daemon, root: Path, shape: str
) -> None:
    root.with_name("outside").write_bytes(b"secret")
    (root / "plain").mkdir(exist_ok=True)
    (root / "plain/f").write_bytes(b"x")
    path, make = SHAPES[shape]
    make(root)
    async with peer(served) as client:
        for event, at in (
            (final(file_ref(path)), "event.content.path"),
            ({"type": "artifact", "name": "n", "content": file_ref(path)}, "event.content.path"),
            ({"type": "partial", "chunk": file_ref(path)}, "event.chunk.path"),
        ):
            error = await refused(client, "outputs.append", params(event, shape))
            assert (error.error["code"], error.type, error.data["path"]) == (-32602, "invalid_params", at)
            assert "secret" not in error.error["message"]
        assert (await client.call("outputs.list", {"task_id": shape, "attempt": 1}))["outputs"] == []
        await append(client, final(file_ref("plain/f")), "plain")


def _link(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda file: file.write_bytes(b"other content"),
    "gone": lambda file: file.unlink(),
    "link": _link,
    "hard link": lambda file: file.with_name("second").hardlink_to(file),
    "fifo": _fifo,
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_is_not_what_it_was_is_a_conflict(served: Daemon, root: Path, change: str) -> None:
    folder = root / f"change-{change}"
    folder.mkdir()
    (folder / "f").write_bytes(b"right content")
    (folder / "k").write_bytes(b"kept")
    async with peer(served) as client:
        id_ = await append(client, final(file_ref(f"{folder.name}/f")), change, idempotency_key=change)
        kept = await append(client, final(file_ref(f"{folder.name}/k")), change)
        assert (await read(client, id_))["data"] == "right content"
        CHANGES[change](folder / "f")
        for offset in (0, 13):
            error = await refused(client, "outputs.read", {"id": id_, "offset": offset})
            assert (error.error["code"], error.data["reason"]) == (-32011, "file_changed")
        assert (await client.call("outputs.get", {"id": id_}))["event"]["content"]["path"].endswith("/f")
        again = params(final(file_ref(f"{folder.name}/f")), change, idempotency_key=change)
        assert (await client.call("outputs.append", again))["id"] == id_
        error = await refused(client, "outputs.append", again | {"attempt": 2})
        assert error.data["reason"] == "key_reused"
        assert (await read(client, kept))["data"] == "kept"
    figures = await asyncio.to_thread(served.metrics)
    assert figures["files_changed"] >= 2


async def test_a_file_may_be_as_large_as_the_limit_and_not_larger(start: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(bytes(1_000))
    (tmp_path / "root/g").write_bytes(bytes(1_001))
    daemon = start("--file-root", str(tmp_path / "root"), file_bytes=1_000)
    async with peer(daemon) as client:
        assert (await read(client, await append(client, final(file_ref("f")))))["size"] == 1_000
        error = await refused(client, "outputs.append", params(final(file_ref("g"))))
        assert (error.type, error.data["path"]) == ("invalid_params", "event.content.path")
        assert "file_bytes" in error.error["message"]


async def test_without_a_root_there_are_no_files(start: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(b"x")
    daemon = start(file_root=tmp_path / "root")
    async with peer(daemon) as client:
        id_ = await append(client, final(file_ref("f")))
    assert daemon.terminate() == 0
    del daemon.settings["file_root"]
    daemon.start()
    async with peer(daemon) as client:
        error = await refused(client, "outputs.append", params(final(file_ref("f"))))
        assert (error.type, error.data["path"]) == ("invalid_params", "event.content.path")
        assert "--file-root" in error.error["message"]
        assert (await refused(client, "outputs.read", {"id": id_})).type == "unavailable"
        assert (await client.call("outputs.get", {"id": id_}))["event"]["content"]["path"] == "f"


def test_a_root_that_cannot_be_used_is_one_line_and_no_daemon(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder, why in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "file", "Not a dir"),
        (tmp_path, "secrets"),
    ):
        daemon = Daemon(tmp_path / "state", file_root=folder)
        with pytest.raises(NotStarted, match=f"exit 1(.|\n)*carserver: --file-root .*{why}") as caught:
            daemon.start()
        assert "Traceback" not in str(caught.value)
