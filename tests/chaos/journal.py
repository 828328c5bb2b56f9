"""What players write down: a line before each call and one after it, which stay when the player is killed."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One call of one player, as far as it got.

    Attributes:
        who, life, pid: the player ("a0": rank 0 of side "a"; "p0" and "q0" publish and pull in the processes of "a0" and "b0"), how often
            it was started, and its process.
        number, call: of its calls in this life which, and what: "connect", "init_pair", "register", "send", "recv", "close", and
            "publish", "pull", "push", "update", "leave".
        begin, end: monotonic seconds; no ``end`` as long as it has not returned.
        outcome: "ok", or the class of its error; ``detail`` is its message.
        version: of a transfer, as its report says.
        nonce: what a sender's tensors held.
        reached: the receivers that a push says have it; None for a send, which all must have.
        failed: the classes of errors that it gives for others.
        taken: for each sender, the nonce that a receiver's tensors held afterwards.
        through: those of its own side that passed on to a receiver what it took.
        wrong: what does not belong into a receiver's tensors; empty when all is well.
    """

    who: str
    life: int
    pid: int
    number: int
    call: str
    begin: float
    end: float | None = None
    outcome: str | None = None
    detail: str = ""
    version: int = 0
    nonce: int = 0
    reached: list[str] | None = None
    failed: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    through: list[str] = field(default_factory=list)
    wrong: str = ""

    @property
    def process(self) -> str:
        """The player whose process it is: that of "p0" is the one of "a0"."""
        return {"p": "a", "q": "b"}.get(self.who[0], self.who[0]) + self.who[1:]


class Journal:
    """A player's own. Lines are written whole."""

    def __init__(self, folder: Path, who: str, life: int) -> None:
        self._who, self._life, self._number = who, life, 0
        self._file = os.open(folder / f"{who}.{life}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def begin(self, call: str, nonce: int = 0) -> Entry:
        """Before a call."""
        self._number += 1
        entry = Entry(self._who, self._life, os.getpid(), self._number, call, time.monotonic(), nonce=nonce)
        self._write(entry)
        return entry

    def end(self, entry: Entry, **outcome: object) -> Entry:
        """After it."""
        ended = Entry(**{**asdict(entry), "end": time.monotonic(), **outcome})
        self._write(ended)
        return ended

    def _write(self, entry: Entry) -> None:
        os.write(self._file, json.dumps(asdict(entry)).encode() + b"\n")


class Reader:
    """All journals of a folder, read on from where they were last read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.entries: dict[tuple[str, int, int], Entry] = {}
        self.latest: dict[str, Entry] = {}
        self.failed: dict[str, Entry] = {}
        """The last call of each that ended with an error."""
        self.through: dict[str, list[str]] = {}
        """Who passed on to each receiver in its last good receive."""
        self._order: list[Entry] = []

    def poll(self) -> None:
        """Take in what was written since."""
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in self._lines(path):
                entry = Entry(**json.loads(line))
                self.entries[entry.who, entry.life, entry.number] = entry
                self._order.append(entry)
                last = self.latest.get(entry.who)
                if last is None or (entry.life, entry.number) >= (last.life, last.number):
                    self.latest[entry.who] = entry
                if entry.outcome not in (None, "ok"):
                    self.failed[entry.who] = entry
                if entry.call == "recv" and entry.outcome == "ok":
                    self.through[entry.who] = entry.through

    def since(self, moment: float) -> list[Entry]:
        """Calls that have begun or ended after that moment, or shortly before."""
        recent = list(itertools.takewhile(lambda entry: (entry.end or entry.begin) > moment - 60, reversed(self._order)))
        return list({(entry.who, entry.life, entry.number): entry for entry in reversed(recent)}.values())

    def _lines(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(whole)
        yield from whole.splitlines()
