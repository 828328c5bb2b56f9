"""What is logged while a test runs: counted, as it is too much to be kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Heard(logging.Handler):
    """How often each line came, by its text before anything is put into it; and those with a traceback, whole."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines = Counter[str]()
        self.faults: list[str] = []
        """What agents log with a traceback is nobody's doing but theirs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[record.msg] += 1
        if record.exc_info and record.exc_info[1]:
            self.faults.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def count(self, *beginnings: str) -> int:
        """How many lines begin so."""
        return sum(count for line, count in self.lines.items() if line.startswith(beginnings))


@contextmanager
def listening() -> Iterator[Heard]:
    """All that etha_ray logs meanwhile."""
    logger, heard = logging.getLogger("etha_ray"), Heard()
    before, propagates = logger.level, logger.propagate
    logger.addHandler(heard)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # pytest would keep all of it
    try:
        yield heard
    finally:
        logger.propagate = propagates
        logger.setLevel(before)
        logger.removeHandler(heard)
