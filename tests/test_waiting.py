"""Long waits say what they wait for; short ones say nothing, and cost nothing."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from etha_ray import waiting
from etha_ray.testing import eventually
from etha_ray.waiting import LongWait
from tests.fresh import fresh
from tests.tensor_bus.cluster import LONG, local_cluster


class _Clock:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(waiting, "time", made)
    return made


def test_a_log_gets_a_line_a_minute_and_none_before(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[float] = []

    def reason() -> str:
        asked.append(clock.now)
        return "trainer[0] did not send"

    wait = LongWait("transfer for 'policy'", 300.0, reason)
    for _ in range(1250):  # ticks of 0.1 s, as they come
        clock.now += 0.1
        wait.tick()
    wait.end()
    assert [record.getMessage() for record in caplog.records] == [
        "transfer for 'policy' waits, 60 of 300 s: trainer[0] did not send",
        "transfer for 'policy' waits, 120 of 300 s: trainer[0] did not send",
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records), "seen also where nobody set logging up"
    assert len(asked) <= 1 + (125 - 2) / 0.5


def test_a_short_wait_asks_nobody_and_shows_nothing(clock: _Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_display", lambda: pytest.fail("nothing is to be shown"))
    wait = LongWait("transfer for 'policy'", None, lambda: pytest.fail("nobody is to be asked"))
    for _ in range(19):
        clock.now += 0.1
        wait.tick()
    wait.end()


def test_torchruns_workers_log_also_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert type(waiting._display()).__name__ == "_Terminal"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert type(waiting._display()).__name__ == "_Log"


def test_a_notebook_gets_a_bar_that_goes_away(clock: _Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    class ZMQInteractiveShell(InteractiveShell):  # what a kernel's shell is called
        pass

    ZMQInteractiveShell.instance()
    try:
        with capture_output() as shown:
            wait = LongWait("transfer for '<b>'", 10.0, lambda: "a[0] did not send")
            for _ in range(60):
                clock.now += 0.1
                wait.tick()
            wait.end()
        pages = [output.data["text/html"] for output in shown.outputs]
        assert '<progress max="10" value="2.' in pages[0]
        assert "transfer for &#x27;&lt;b&gt;&#x27; waits, 2 of 10 s: a[0] did not send" in pages[0]
        assert 'value="6.0"' in pages[-2]
        assert pages[-1] == ""
        assert len({output.metadata.get("display_id") or output._repr_mimebundle_()[1].get("display_id") for output in shown.outputs}) == 1
        assert len(pages) <= 10, "twice a second, however often it ticks"
    finally:
        ZMQInteractiveShell.clear_instance()


def _waits(out: str, err: str) -> None:
    """Two waits, in a process of its own whose standard output and error are these files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
    os.environ.pop("LOCAL_RANK", None)
    waiting.AFTER = 0.0
    print("to standard output", flush=True)
    waits = [LongWait(f"transfer for {name!r}", 30.0, lambda: "trainer[0] did not send") for name in ("one", "two")]
    for _ in range(5):
        for wait in waits:
            wait.tick()
        time.sleep(0.01)
    print("more of it", flush=True)
    waits[0].end()
    waits[1].tick()
    waits[1].end()
    print("done", file=sys.stderr, flush=True)


def test_a_terminal_shows_each_wait_and_leaves_no_trace(tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    process = fresh.Process(target=_waits, args=(str(tmp_path / "out"), os.ttyname(terminal)))
    process.start()
    drawn, deadline = b"", time.monotonic() + LONG
    while b"done" not in drawn and time.monotonic() < deadline:
        if select.select([screen], [], [], 1.0)[0]:
            drawn += os.read(screen, 65536)
    process.join(LONG)
    os.close(screen)
    os.close(terminal)
    assert process.exitcode == 0, drawn
    assert (tmp_path / "out").read_text() == "to standard output\nmore of it\n", "standard output is left alone"
    text = drawn.decode()
    for name in ("one", "two"):
        assert re.search(rf"transfer for '{name}' waits, \d+ of 30 s: trainer\[0\] did not send", text)
    assert "\x1b[2K" in text.split("done")[0][-40:], "the lines are erased at the end"


def test_without_a_terminal_standard_error_stays_empty(tmp_path: Path) -> None:
    process = fresh.Process(target=_waits, args=(str(tmp_path / "out"), str(tmp_path / "err")))
    process.start()
    process.join(LONG)
    assert (process.exitcode, (tmp_path / "err").read_text()) == (0, "done\n")


def test_a_clients_waits_name_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    removed: list[str] = []

    class Display:
        def show(self, wait: LongWait) -> None:
            shown.append(f"{wait.what}: {wait.said}")

        def remove(self, wait: LongWait) -> None:
            removed.append(wait.what)

    monkeypatch.setattr(waiting, "AFTER", 0.0)
    monkeypatch.setattr(waiting, "_REASON_EVERY", 0.0)
    monkeypatch.setattr(waiting, "_display", Display)
    with local_cluster() as cluster:
        _, receiver, *_ = cluster.batch()
        semaphore: Any = receiver.transfer("recv")

        def named() -> bool:
            """Its agent says twice a second for whom it waits."""
            with pytest.raises(TimeoutError):
                semaphore.result(0.3)
            return "transfer for 'batch': a[0] did not send" in shown

        eventually(named)
        assert removed[-1] == "transfer for 'batch'", "what was shown is taken away"
