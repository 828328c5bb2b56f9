"""What a process that was killed while torch moved a storage into shared memory leaves, and who removes it."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from etha_ray import shared_files
from etha_ray.shared_files import SHM_DIR, share_by_name, sweep_unfinished
from etha_ray.testing import eventually
from tests.fresh import fresh
from tests.tensor_bus.cluster import die_sharing


@pytest.fixture
def own_shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Shared memory that only these tests sweep: agents of other tests sweep /dev/shm at any moment."""
    folder = Path(SHM_DIR, f"test_shared_files_{secrets.token_hex(8)}")
    folder.mkdir(0o700)
    monkeypatch.setattr(shared_files, "SHM_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def unfinished(own_shm: Path) -> Path:
    """A file as torch leaves it, with room made."""
    path = own_shm / f"torch_1_{secrets.randbits(32)}_0"
    path.touch(0o600)
    os.truncate(path, 8192)
    return path


def left_by_torch(folder: Path) -> str:
    """The name of what a killed process left, now in this folder."""
    while True:
        process = fresh.Process(target=die_sharing, args=({},))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGXFSZ
        for name in os.listdir(SHM_DIR):
            if name.startswith(f"torch_{process.pid}_"):
                with contextlib.suppress(FileNotFoundError):  # an agent of another test was faster
                    os.rename(f"{SHM_DIR}/{name}", folder / name)
                    return name


def test_what_torch_leaves_is_removed(own_shm: Path) -> None:
    name = left_by_torch(own_shm)
    eventually(lambda: sweep_unfinished() == [name])  # a sweep of another test may still have it open
    assert not list(own_shm.iterdir())


def test_room_made_already(unfinished: Path) -> None:
    assert unfinished.name in sweep_unfinished()
    assert not unfinished.exists()


def test_what_a_process_has_open_is_left(unfinished: Path) -> None:
    """In whatever pid namespace, as containers that share /dev/shm are."""
    hold = f"import os; os.open({str(unfinished)!r}, os.O_RDWR); print(flush=True); input()"
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        alone = []  # not allowed here
    with subprocess.Popen([*alone, sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        assert unfinished.name not in sweep_unfinished()
        assert unfinished.exists()
        process.stdin.close()
    assert unfinished.name in sweep_unfinished()


def test_what_is_only_mapped_is_left(unfinished: Path) -> None:
    with open(unfinished, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 8192)
    assert unfinished.name not in sweep_unfinished()
    mapped.close()
    assert unfinished.name in sweep_unfinished()


def test_what_torch_keeps_by_name_is_left() -> None:
    """On its way to another process nobody has it open: only the reference count at its head says that it is wanted."""
    storage = torch.ones(100).untyped_storage()
    path = Path(share_by_name(storage).path)
    storage._shared_incref()
    del storage
    assert path.name not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert path.name not in sweep_unfinished()
    assert path.exists()
    path.unlink()


def test_what_was_only_being_made_when_it_was_looked_at_is_left(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process counts itself, and lets go, before the sweep is alone with the file."""

    def counted_meanwhile(fd: int) -> bool:
        os.pwrite(fd, b"\1", 0)
        return True

    monkeypatch.setattr(shared_files, "_nobody_else_has", counted_meanwhile)
    assert unfinished.name not in sweep_unfinished()
    assert unfinished.exists()


def test_nobody_else_may_open_what_has_a_name() -> None:
    storage = torch.ones(100).untyped_storage()
    assert stat.S_IMODE(os.stat(share_by_name(storage).path).st_mode) == 0o600


@pytest.mark.parametrize("name", ["torch_1", "torch_1_2_3_4", "torch_x_1_2", "xtorch_1_2_3", "torch_1_2_3.bak"])
def test_other_names_are_left(name: str) -> None:
    path = Path(SHM_DIR, name)
    path.touch(0o600)
    try:
        assert name not in sweep_unfinished()
        assert path.exists()
    finally:
        path.unlink()


def test_a_link_is_not_followed(unfinished: Path, tmp_path: Path) -> None:
    unfinished.unlink()
    target = tmp_path / "target"
    target.touch()
    unfinished.symlink_to(target)
    assert unfinished.name not in sweep_unfinished()
    assert target.exists()
    assert unfinished.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, as only root can")
def test_another_users_is_left(unfinished: Path) -> None:
    os.chown(unfinished, 12345, 12345)
    assert unfinished.name not in sweep_unfinished()
    assert unfinished.exists()


def test_of_many_sweeps_at_once_one_removes_it(own_shm: Path) -> None:
    with ThreadPoolExecutor(4) as sweepers:
        for _ in range(20):
            path = own_shm / f"torch_1_{secrets.randbits(32)}_0"
            path.touch(0o600)
            sweeps = [sweepers.submit(sweep_unfinished) for _ in range(4)]
            removed = [name for sweep in sweeps for name in sweep.result()]
            removed += sweep_unfinished()  # each may have seen another one's descriptor, where threads wait long for their turn
            assert not path.exists()
            assert removed.count(path.name) == 1
