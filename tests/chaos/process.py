"""The process in which a player lives, on the host of its seat."""

from __future__ import annotations

import faulthandler
import signal
import sys

import torch

from tests.chaos.player import Seat
from tests.chaos.weights import Life
from tests.cluster.hosts import enter


def run(seat: Seat, life: int) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    if seat.host is not None:
        enter(seat.host)
    log = (seat.folder / f"{seat.who}.{life}.log").open("w")
    sys.stderr = log
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    lived = Life(seat, life)
    signal.signal(signal.SIGTERM, lambda *_: lived.leave())
    lived.play()
