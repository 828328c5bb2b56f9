from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etha_ray.errors import UnsafePathError
from etha_ray.tensor_bus import semaphores
from etha_ray.tensor_bus.semaphores import (
    SHM_DIRECTORY,
    generate_semaphore_name,
    is_semaphore_name,
    open_semaphore,
    queue_semaphore_name,
    sweep_dead,
    unlink_quietly,
    waited_for,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def file_of(name: str) -> Path:
    return SHM_DIRECTORY / f"sem.{name[1:]}"


@pytest.fixture
def name() -> Iterator[str]:
    name = generate_semaphore_name("test", "semaphores")
    yield name
    file_of(name).unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def own_namespace() -> Iterator[int]:
    """A pid namespace that no agent is in: those of other tests sweep at any moment, and would take what these tests leave."""
    number = secrets.randbits(32)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(semaphores, "pid_namespace", lambda: number)
        yield number


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# --- names ---


def test_a_name_tells_command_context_process_and_namespace(own_namespace: int) -> None:
    name = generate_semaphore_name("transfer", "job/7:step 3\tx")
    assert re.fullmatch(rf"/command_transfer_job_7_step_3_x_{os.getpid()}_{own_namespace:08x}[0-9a-f]{{24}}", name)


def test_names_differ() -> None:
    assert len({generate_semaphore_name("transfer", "b") for _ in range(1000)}) == 1000


@given(command_type=st.text(), context=st.text())
def test_any_context_makes_a_name_that_fits(command_type: str, context: str) -> None:
    name = generate_semaphore_name(command_type, context)
    assert len(name.encode()) <= 251
    assert name.isascii()
    assert name.isprintable()
    assert not set(name[1:]) & set("/: ")


@pytest.mark.parametrize("context", ["x" * 10_000, "ü" * 300, "日本語/" * 100, "a\0b\nc", ""])
def test_the_system_takes_the_name_and_the_sweep_knows_it(context: str, dead_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: dead_pid)
        name = generate_semaphore_name("register_tensors", context)
    semaphore = open_semaphore(name, create=True)
    try:
        assert file_of(name).exists()
    finally:
        semaphore.close()
        assert file_of(name).name in sweep_dead()
    assert not file_of(name).exists()


def test_a_queue_has_one_name_for_every_spelling_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.lmdb"
    (tmp_path / "link").symlink_to(tmp_path)
    name = queue_semaphore_name(path, "items")
    assert re.fullmatch(r"/cq_items_[0-9a-f]{32}", name)
    assert queue_semaphore_name(str(tmp_path / "link" / ".." / tmp_path.name / "q.lmdb"), "items") == name
    assert queue_semaphore_name(path, "space") != name
    assert queue_semaphore_name(tmp_path / "r.lmdb", "items") != name
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert queue_semaphore_name(path, "items") != name


# --- opening ---


def test_a_semaphore_is_made_once_for_its_user_only(name: str) -> None:
    with pytest.raises(posix_ipc.ExistentialError):
        open_semaphore(name, create=False)
    first = open_semaphore(name, create=True)
    assert stat.S_IMODE(file_of(name).stat().st_mode) == 0o600
    first.release()
    second = open_semaphore(name, create=True)
    third = open_semaphore(name, create=False)
    assert second.value == third.value == 1
    for semaphore in (first, second, third):
        semaphore.close()


@needs_root
@pytest.mark.parametrize("create", [False, True])
def test_a_semaphore_of_another_user_is_not_opened(name: str, create: bool) -> None:
    open_semaphore(name, create=True).close()
    os.chown(file_of(name), 12345, -1)
    with pytest.raises(UnsafePathError, match=re.escape(name)):
        open_semaphore(name, create=create)


def test_unlinking_twice_is_silent(name: str) -> None:
    open_semaphore(name, create=True).close()
    unlink_quietly(name)
    assert not file_of(name).exists()
    unlink_quietly(name)


@pytest.mark.parametrize("name", ["", "/", "x", "/a/b", "/a\0b", "a\0b", "/.", "/..", "/" + "x" * 251, "/" + "é" * 126])
def test_what_is_no_name_of_a_semaphore(name: str) -> None:
    """posix_ipc crashes on some of them."""
    assert not is_semaphore_name(name)
    for create in (True, False):
        with pytest.raises(ValueError, match="is no name of a semaphore"):
            open_semaphore(name, create)


def test_the_longest_name() -> None:
    name = "/" + "x" * 250
    assert is_semaphore_name(name)
    open_semaphore(name, create=True).close()
    unlink_quietly(name)


# --- sweeping ---


def leftovers(pid: int, namespace: int) -> list[Path]:
    semaphore = SHM_DIRECTORY / f"sem.command_transfer_b_1_{pid}_{namespace:08x}{os.urandom(12).hex()}"
    nonce = SHM_DIRECTORY / f"etha_ray.{namespace:08x}.{pid}.{os.urandom(4).hex()}"
    for path in (semaphore, nonce):
        path.touch(mode=0o600)
    return [semaphore, nonce]


def sweep_with(paths: list[Path]) -> set[Path]:
    """Which of these files the sweep leaves; whatever it leaves is removed."""
    try:
        removed = sweep_dead()
        left = {path for path in paths if path.exists()}
        assert {path.name for path in paths} & set(removed) == {path.name for path in paths} - {path.name for path in left}
        return left
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_what_a_dead_process_left_is_removed(dead_pid: int, own_namespace: int) -> None:
    assert sweep_with(leftovers(dead_pid, own_namespace)) == set()


def test_what_a_killed_process_left_is_removed(own_namespace: int) -> None:
    code = (
        "import os, signal\n"
        "from etha_ray.tensor_bus import semaphores\n"
        f"semaphores.pid_namespace = lambda: {own_namespace}\n"
        "name = semaphores.generate_semaphore_name('transfer', 'b')\n"
        "semaphores.open_semaphore(name, create=True)\n"
        "print(name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    name = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout.decode().strip()
    assert file_of(name).exists()
    assert sweep_with([file_of(name)]) == set()


def test_what_living_processes_have_stays(own_namespace: int) -> None:
    paths = leftovers(os.getpid(), own_namespace) + leftovers(os.getppid(), own_namespace)
    assert sweep_with(paths) == set(paths)


def test_what_another_namespace_has_stays(dead_pid: int, own_namespace: int) -> None:
    paths = leftovers(dead_pid, own_namespace ^ 1)
    assert sweep_with(paths) == set(paths)


@needs_root
def test_what_another_user_has_stays(dead_pid: int, own_namespace: int) -> None:
    paths = leftovers(dead_pid, own_namespace)
    for path in paths:
        os.chown(path, 12345, -1)
    assert sweep_with(paths) == set(paths)


def test_names_that_are_not_ours_stay(dead_pid: int, own_namespace: int) -> None:
    tail = f"{own_namespace:08x}{os.urandom(12).hex()}"
    names = [
        f"sem.command_b_{dead_pid}_{tail}0",
        f"sem.other_b_{dead_pid}_{tail}",
        f"etha_ray.{own_namespace:08x}.{dead_pid}",
        f"x{tail}",
    ]
    paths = [SHM_DIRECTORY / name for name in names]
    for path in paths:
        path.touch()
    assert sweep_with(paths) == set(paths)


def test_nothing_is_swept_where_processes_cannot_be_seen(dead_pid: int, own_namespace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etha_ray.tensor_bus.semaphores.is_alive", lambda pid: False)
    paths = leftovers(dead_pid, own_namespace)
    assert sweep_with(paths) == set(paths)


@pytest.mark.parametrize("name", ["", "/", "é" * 200, "/" + "x" * 300, "/a\0b", "/a/b"])
def test_nobody_waits_for_what_is_no_name(name: str) -> None:
    assert not waited_for(name)
