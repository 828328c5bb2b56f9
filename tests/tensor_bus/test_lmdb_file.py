from __future__ import annotations

import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from etha_ray.errors import QueueClosedError, QueueError, UnsafePathError
from etha_ray.tensor_bus import lmdb_file
from etha_ray.tensor_bus.lmdb_file import LmdbFile, open_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def open_(path: Path, create: bool = True) -> LmdbFile:
    return open_file(path, map_size=1 << 20, max_dbs=2, create=create)


def put(file: LmdbFile, key: bytes, value: bytes) -> None:
    with file.lock, file.env.begin(write=True) as txn:
        txn.put(key, value)


def get(file: LmdbFile, key: bytes) -> bytes | None:
    with file.lock, file.env.begin() as txn:
        value: bytes | None = txn.get(key)
        return value


def lock_of(path: Path) -> Path:
    return path.with_name(path.name + "-lock")


def in_child(action: Callable[[], None]) -> None:
    """Run ``action`` in a forked child, which must end well."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the forked child hangs"
    assert child.exitcode == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.lmdb"


# --- making and removing ---


def test_both_files_are_made_for_this_user_only(path: Path) -> None:
    old = os.umask(0)
    try:
        file = open_(path)
    finally:
        os.umask(old)
    for made in (path, lock_of(path)):
        assert stat.S_IMODE(made.stat().st_mode) == 0o600
    put(file, b"k", b"v")
    file.close()
    with open_(path, create=False) as again:
        assert get(again, b"k") == b"v"


def test_a_missing_file_is_only_made_when_asked(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        open_(path, create=False)
    with pytest.raises(FileNotFoundError):
        open_(path / "below" / "bus.lmdb")


def test_an_empty_file_is_taken_over(path: Path) -> None:
    path.touch(mode=0o600)
    with open_(path, create=False) as file:
        put(file, b"k", b"v")


def test_unlink_removes_both_files_once(path: Path) -> None:
    file = open_(path)
    seen = []
    assert file.unlink(before=lambda: seen.append(path.exists()))
    assert seen == [True]
    assert not path.exists()
    assert not lock_of(path).exists()
    assert not file.unlink(before=lambda: seen.append(False))
    assert seen == [True]
    put(file, b"k", b"v")  # who has it open keeps it
    file.close()


def test_unlink_leaves_another_file_at_the_path_alone(path: Path) -> None:
    old = open_(path)
    path.unlink()
    new = open_(path)
    assert not old.owns_path()
    assert not old.unlink()
    assert new.owns_path()
    assert path.exists()
    old.close()
    new.close()


def test_unlink_leaves_a_symlink_at_the_path_alone(path: Path) -> None:
    file = open_(path)
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    assert not file.unlink()
    assert path.is_symlink()
    file.close()


def test_a_lock_file_without_data_is_a_leftover(path: Path) -> None:
    with open_(path):
        before = lock_of(path).stat().st_ino
        keep_number = lock_of(path).open()  # so that the new one cannot get the same inode
        path.unlink()
    with open_(path) as file:
        assert lock_of(path).stat().st_ino != before
        put(file, b"k", b"v")
    keep_number.close()


# --- one environment for each file in a process ---


def test_users_of_one_file_share_its_environment(path: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    first = open_(tmp_path / "sub" / "bus.lmdb")
    second = open_(tmp_path / "link" / "bus.lmdb")
    assert second.env is first.env
    assert second.path == first.path
    first.close()
    first.close()
    put(second, b"k", b"v")
    second.close()
    with pytest.raises(QueueClosedError, match="open it again"):
        _ = second.env
    with pytest.raises(QueueClosedError):
        second.unlink()
    # The last user really closed it: LMDB itself lets the file be opened again.
    lmdb.open(str(tmp_path / "sub" / "bus.lmdb"), subdir=False).close()


@pytest.mark.parametrize("also_lock", [False, True])
def test_a_replaced_file_gets_its_own_environment(path: Path, also_lock: bool) -> None:
    old = open_(path)
    put(old, b"k", b"old")
    path.unlink()
    if also_lock:
        lock_of(path).unlink()
    new = open_(path)
    assert new.env is not old.env
    assert get(new, b"k") is None
    put(new, b"k", b"new")
    assert get(old, b"k") == b"old"
    old.close()
    assert get(new, b"k") == b"new"
    new.close()


def test_threads_open_and_close_at_once(path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(50):
                with open_(path) as file:
                    put(file, b"%d" % number, b"%d" % turn)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with open_(path) as file:
        assert [get(file, b"%d" % number) for number in range(4)] == [b"49"] * 4


def test_who_removes_it_takes_nobodys_new_lock_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the data is gone, another process may make both files."""
    unlink, file, made = os.unlink, open_(path), []

    def then_another_comes(name: Path) -> None:
        unlink(name)
        if name == path and not made:
            made.append(open_(path))

    monkeypatch.setattr(lmdb_file.os, "unlink", then_another_comes)
    assert file.unlink()
    monkeypatch.undo()
    assert lock_of(path).exists()
    file.close()
    made[0].close()


def test_what_was_half_removed_is_made_anew(path: Path) -> None:
    """Who still has the old one open and who opens the new one would have two locks of one file."""
    old = open_(path)
    put(old, b"k", b"old")
    lock_of(path).unlink()
    with pytest.raises(FileNotFoundError):
        open_(path, create=False)
    new = open_(path)
    assert get(old, b"k") == b"old"
    put(new, b"k", b"new")
    assert get(old, b"k") == b"old"
    assert not old.owns_path()
    old.close()
    new.close()


def test_processes_make_and_remove_the_file_at_once(path: Path) -> None:
    # Whatever the order, nobody may end up with one half of two pairs of files.
    code = (
        "import sys\n"
        "from etha_ray.tensor_bus.lmdb_file import open_file\n"
        "for turn in range(100):\n"
        "    file = open_file(sys.argv[1], map_size=1 << 20, max_dbs=2, create=True)\n"
        "    with file.env.begin(write=True) as txn:\n"
        "        txn.put(b'k', b'v')\n"
        "    file.unlink()\n"
        "    file.close()\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert not path.exists()
    assert not lock_of(path).exists()


# --- refusing what is not safe ---


def test_a_symlink_is_refused(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.lmdb"
    open_(target).close()
    for points_to in (target, tmp_path / "nothing"):
        path.symlink_to(points_to)
        with pytest.raises(UnsafePathError, match=r"is a symlink; it is owned by .*uid \d+; remove it or choose another path"):
            open_(path)
        path.unlink()
    assert not (tmp_path / "nothing").exists()


def test_a_symlink_as_lock_file_is_refused(path: Path, tmp_path: Path) -> None:
    open_(path).close()
    lock_of(path).unlink()
    lock_of(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match=re.escape(f"{lock_of(path)} is a symlink")):
        open_(path)
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_regular_file_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(UnsafePathError, match="not a regular file"):
        open_(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UnsafePathError, match="not a regular file"):
        open_(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("which", ["data", "lock"])
def test_a_file_that_others_may_write_is_refused(path: Path, mode: int, which: str) -> None:
    open_(path).close()
    (path if which == "data" else lock_of(path)).chmod(mode)
    with pytest.raises(UnsafePathError, match=f"may be written by others \\(mode {mode:04o}\\)"):
        open_(path)


@needs_root
@pytest.mark.parametrize("which", ["data", "lock"])
def test_a_file_of_another_user_is_refused(path: Path, which: str) -> None:
    open_(path).close()
    os.chown(path if which == "data" else lock_of(path), 12345, -1)
    with pytest.raises(UnsafePathError, match="owned by uid 12345; remove it or choose another path"):
        open_(path)


@needs_root
def test_a_file_of_root_is_refused_to_another_user(path: Path) -> None:
    open_(path).close()
    for directory in path.parents[:-1]:
        if directory.stat().st_uid == 0 and directory != Path("/tmp"):
            directory.chmod(0o755)

    def attempt() -> None:
        os.setresuid(12345, 12345, 12345)
        with pytest.raises(UnsafePathError, match="does not belong to the user running this"):
            open_(path)

    in_child(attempt)


def test_another_kind_of_file_is_refused_and_kept(path: Path) -> None:
    path.write_bytes(b"my thesis\n" * 1000)
    path.chmod(0o600)
    with pytest.raises(QueueError, match="cannot be opened as an LMDB file"):
        open_(path)
    assert path.read_bytes().startswith(b"my thesis")


# --- fork ---


def test_a_forked_child_opens_its_own(path: Path) -> None:
    file = open_(path)
    inherited = file.env

    def work() -> None:
        assert not file.attached
        assert file.env is not inherited
        assert file.attached
        other = open_(path)
        assert other.env is file.env
        put(other, b"child", b"1")
        file.close()
        put(other, b"child", b"2")

    in_child(work)
    assert file.env is inherited
    assert get(file, b"child") == b"2"
    file.close()


def test_a_forked_child_outlives_its_parents_use(path: Path) -> None:
    # A child that went on with the inherited locks would be unknown to those who come after the parent.
    file = open_(path)
    ready, go = multiprocessing.Pipe()

    def work() -> None:
        put(file, b"child", b"before")
        ready.send(None)
        ready.recv()
        for turn in range(200):
            put(file, b"child", b"%d" % turn)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    go.recv()
    file.close()
    file = open_(path)
    go.send(None)
    for turn in range(200):
        put(file, b"parent", b"%d" % turn)
    child.join(30)
    assert child.exitcode == 0
    assert (get(file, b"child"), get(file, b"parent")) == (b"199", b"199")
    file.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_forked_child_does_not_take_another_file_for_its_own(path: Path, replaced: bool) -> None:
    file = open_(path)
    path.rename(path.with_name("moved"))
    if replaced:
        open_(path).close()

    def work() -> None:
        with pytest.raises(QueueClosedError, match="after this process forked"):
            _ = file.env
        assert not file.unlink()
        file.close()

    in_child(work)
    assert path.exists() == replaced
    file.close()


def test_forking_while_threads_are_inside_transactions(path: Path) -> None:
    files = [open_(path), open_(path.with_name("other.lmdb"))]
    stop = threading.Event()

    def busy(file: LmdbFile) -> None:
        while not stop.is_set():
            put(file, b"k", b"v")
            get(file, b"k")

    def work() -> None:
        for file in files:
            put(file, b"child", b"v")

    threads = [threading.Thread(target=busy, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            in_child(work)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for file in files:
        assert get(file, b"child") == b"v"
        file.close()


def test_a_process_killed_inside_a_transaction_keeps_nobody_out(path: Path) -> None:
    file = open_(path)
    put(file, b"k", b"whole")
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            with file.env.begin(write=True) as txn:
                txn.put(b"k", b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        assert get(file, b"k") == b"whole"
        put(file, b"k", b"whole")
    file.close()
