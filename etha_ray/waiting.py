"""Waits that take long say what they wait for: in a terminal, in a notebook, else in the log.

Nothing is shown before `AFTER` seconds, and nothing is left once the wait is over. In a terminal a spinner turns on standard error, one
line for each wait under way; in a notebook there is a bar below the cell; anywhere else (a job, a Ray actor, one of torchrun's workers,
who share a terminal) the log gets a line a minute.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from etha_ray.config import worker_environment

if TYPE_CHECKING:
    from rich.live import Live

logger = logging.getLogger(__name__)

AFTER = 2.0
"""Seconds of a wait before anything is shown."""

LOG_EVERY = 60.0
"""Seconds between two lines in the log."""

_REASON_EVERY = 0.5
"""Seconds between two looks at what is waited for."""


class _Display(Protocol):
    """Where a long wait is shown."""

    def show(self, wait: LongWait) -> None:
        """Show it, or show it anew."""

    def remove(self, wait: LongWait) -> None:
        """It is over; it was shown."""


class LongWait:
    """One wait, that may become long. On the thread that waits.

    Args:
        what: what is waited for, such as ``transfer for 'policy'``.
        limit: seconds after which the wait is given up; None for never.
        reason: says who is missing, in words, or nothing; asked twice a second at most.
    """

    def __init__(self, what: str, limit: float | None, reason: Callable[[], str]) -> None:
        self.what = what
        self.limit = limit
        self.began = time.monotonic()
        self.said = ""
        self._reason = reason
        self._asked = 0.0
        self._display: _Display | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began

    def tick(self) -> None:
        """It goes on: show it, if it is time."""
        if self.seconds < AFTER:
            return
        now = time.monotonic()
        if now - self._asked >= _REASON_EVERY:
            self._asked, self.said = now, self._reason()
        if self._display is None:
            self._display = _display()
        self._display.show(self)

    def end(self) -> None:
        """It is over."""
        if self._display is not None:
            self._display.remove(self)

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of {self.limit:g}"
        return f"{self.what} waits, {self.seconds:.0f}{limit} s" + (f": {self.said}" if self.said else "")


class _Log:
    """A line a minute. Each wait has its own."""

    def __init__(self) -> None:
        self._next = LOG_EVERY

    def show(self, wait: LongWait) -> None:
        if wait.seconds >= self._next:
            self._next += LOG_EVERY
            logger.warning("%s", str(wait))  # as it is now, whenever it is written

    def remove(self, wait: LongWait) -> None:
        """The log keeps what was said."""


class _Terminal:
    """The lines at the bottom of the terminal, one for each wait of this process, whatever thread it is on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[LongWait] = []
        self._live: Live | None = None
        self._spinner: Any = None

    def show(self, wait: LongWait) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            if wait not in self._waits:
                self._waits.append(wait)
            if self._live is None:
                self._spinner = Spinner("dots", style="cyan")
                # What the program prints meanwhile goes where it always goes: standard output is not for us to redirect.
                self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False)
                self._live.start()
            lines = []
            for each in self._waits:
                line = Table.grid(padding=(0, 1))
                line.add_row(self._spinner, Text(str(each), overflow="ellipsis", no_wrap=True))
                lines.append(line)
            self._live.update(Group(*lines), refresh=True)

    def remove(self, wait: LongWait) -> None:
        with self._lock:
            self._waits.remove(wait)
            if not self._waits and self._live is not None:
                self._live.stop()
                self._live = None


class _Notebook:
    """A bar below the cell, full when the time is up; one without an end where there is no limit."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, wait: LongWait) -> None:
        HTML, display = _ipython()

        now = time.monotonic()
        if self._handle is not None and now - self._shown < _REASON_EVERY:
            return
        self._shown = now
        filled = "" if not wait.limit else f' max="{wait.limit:g}" value="{wait.seconds:.1f}"'
        bar = HTML(f'<div><progress{filled} style="width:240px;vertical-align:middle"></progress> {escape(str(wait))}</div>')
        if self._handle is None:
            self._handle = display(bar, display_id=True)
        else:
            self._handle.update(bar)

    def remove(self, wait: LongWait) -> None:
        HTML, _ = _ipython()

        if self._handle is not None:
            self._handle.update(HTML(""))


def _ipython() -> tuple[Any, Any]:
    """IPython's ``HTML`` and ``display``, which have no types."""
    from IPython.display import HTML, display

    return HTML, display


_terminal = _Terminal()


def _display() -> _Display:
    if _in_notebook():
        return _Notebook()
    # Several workers of torchrun would draw over one another. A Ray worker's standard error is a file.
    if sys.stderr is not None and sys.stderr.isatty() and worker_environment().local_rank is None:
        return _terminal
    return _Log()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
