from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from etha_ray import processes
from etha_ray.processes import is_alive, permit_successor, permit_tracing, pid_namespace, process_start_time


def test_the_start_time_of_a_process_stays_the_same() -> None:
    started = process_start_time(os.getpid())
    assert started is not None
    assert process_start_time(os.getpid()) == started
    assert is_alive(os.getpid())
    assert is_alive(os.getpid(), started)


def test_another_process_with_the_same_pid_is_not_the_one_we_met() -> None:
    started = process_start_time(os.getpid())
    assert started is not None
    assert not is_alive(os.getpid(), started - 0.01)


def test_a_process_is_dead_once_it_is_killed_and_before_anybody_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = process_start_time(child.pid)
    assert started is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert process_start_time(child.pid) is None
    assert not is_alive(child.pid, started)
    child.wait()
    assert not is_alive(child.pid)


def test_a_program_name_with_spaces_and_parentheses_does_not_confuse() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) Z (b c', 0, 0, 0); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        before = process_start_time(os.getpid())
        assert child.stdout is not None
        child.stdout.readline()
        started = process_start_time(child.pid)
        child.kill()
    assert started is not None
    assert before is not None
    assert started >= before


def test_the_pid_namespace_is_shared_with_a_child() -> None:
    code = "from etha_ray.processes import pid_namespace; print(pid_namespace())"
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert int(child.stdout) == pid_namespace()
    assert 0 < pid_namespace() < 1 << 32


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_no_such_pid(pid: int) -> None:
    assert process_start_time(pid) is None


class TestPermitTracing:
    @pytest.fixture
    def permitted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """What the kernel is asked for, as if it had Yama."""
        asked: list[int] = []

        class Libc:
            def prctl(self, option: int, argument: ctypes.c_ulong, *_: int) -> int:
                assert option == 0x59616D61
                asked.append(argument.value)
                return 0

        monkeypatch.setattr(processes, "_tracers", [])
        monkeypatch.setattr(processes.ctypes, "CDLL", lambda *_, **__: Libc())
        return asked

    def test_one_process(self, permitted: list[int]) -> None:
        assert permit_tracing(os.getpid()) == f"process {os.getpid()}"
        assert permit_tracing(os.getpid()) == f"process {os.getpid()}"
        assert permitted == [os.getpid()] * 2

    def test_everybody_where_the_kernel_cannot_keep_two_apart(self, permitted: list[int]) -> None:
        permit_tracing(os.getpid())
        assert permit_tracing(1) == "every process of this user"
        assert permit_tracing(1) == "every process of this user"
        assert permitted == [os.getpid(), 2**64 - 1, 2**64 - 1]

    def test_who_takes_the_place_of_a_dead_one(self, permitted: list[int]) -> None:
        permit_successor(os.getpid())
        assert permitted == []  # nobody was permitted before
        with subprocess.Popen(["true"]) as process:
            permit_tracing(process.pid)
        permit_successor(os.getpid())
        assert permitted == [process.pid, os.getpid()]

    def test_without_yama(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_tracers", [])
        monkeypatch.setattr(processes, "_PR_SET_PTRACER", 0x7FFFFFFF)  # no kernel knows it
        assert permit_tracing() == "nobody else"
