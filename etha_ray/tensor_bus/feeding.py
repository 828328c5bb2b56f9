"""What a receive runs: a program for what is read from senders, and for each relay one that reads from it, or from senders instead.

A relay that fails costs no receive: what it would have passed on is then read from the senders, within the same run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from etha_ray.errors import EthaRayError, NoTransportError, PeerLostError
from etha_ray.tensor_bus.executor import Inflow
from etha_ray.transport.base import CopyProgram
from etha_ray.transport.joint import Move

logger = logging.getLogger(__name__)

Prepare: TypeAlias = Callable[[Sequence[Move]], CopyProgram]


class Feed:
    """The programs that fill one set of targets: a worker's tensors, or the second memory of an atomic receive.

    ``inflows`` and the relay of each, None without one; ``target`` gives where an inflow goes. ``prepare`` makes programs: it is called
    when one is run first, on the thread that runs it, or by `warm`.
    """

    def __init__(self, inflows: Sequence[tuple[Inflow, str | None]], target: Callable[[Inflow], torch.Tensor], prepare: Prepare) -> None:
        self._target, self._prepare = target, prepare
        self._places: dict[str | None, list[int]] = {None: []}
        self._inflows = [inflow for inflow, _ in inflows]
        for place, (_, relay) in enumerate(inflows):
            self._places.setdefault(relay, []).append(place)
        self._programs: dict[tuple[str | None, bool], CopyProgram] = {}

    def warm(self) -> set[str]:
        """Prepare what is run when all goes well; the relays that cannot be read from."""
        unreachable = set()
        for relay in self._places:
            try:
                self.program(relay, relay is not None)
            except (PeerLostError, NoTransportError) as error:
                if relay is None:
                    raise
                logger.warning("a receiver that should pass something on cannot be read from: %s", error)
                unreachable.add(relay)
        return unreachable

    def reading(self, through: Collection[str]) -> Reading:
        """Read everything: through these relays, and of the others what they would pass on from the senders."""
        return Reading(self, [(relay, relay in through) for relay in self._places])

    def again(self, relays: Collection[str]) -> Reading:
        """Read from the senders what these relays would have passed on."""
        return Reading(self, [(relay, False) for relay in sorted(relays)])

    def program(self, relay: str | None, relayed: bool) -> CopyProgram:
        """Of what ``relay`` passes on: read from it, or from the senders; without a relay, what is always read from them."""
        if (relay, relayed) not in self._programs:
            moves = []
            for place in self._places[relay]:
                inflow = self._inflows[place]
                move = inflow.relayed if relayed and inflow.relayed is not None else inflow.move
                moves.append(replace(move, target=self._target(inflow)))
            self._programs[relay, relayed] = self._prepare(moves)
        return self._programs[relay, relayed]

    def places(self, relay: str | None) -> list[int]:
        """Which of the inflows that program fills, in its order."""
        return self._places[relay]


class Reading(CopyProgram):
    """One run of some of a feed's programs, at the same time. ``lost``: relays that failed in it, and were done without."""

    def __init__(self, feed: Feed, parts: Sequence[tuple[str | None, bool]]) -> None:
        self._feed, self._parts = feed, list(parts)
        self.lost: set[str] = set()
        self._errors: dict[str | None, BaseException] = {}
        self._ran: dict[str | None, CopyProgram] = {}

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in self._ran.values())

    def run(self) -> int:
        threads = [threading.Thread(target=self._run, args=part, name="etha-ray relayed", daemon=True) for part in self._parts[1:]]
        for thread in threads:
            thread.start()
        for part in self._parts[:1]:
            self._run(*part)
        for thread in threads:
            thread.join()
        for error in self._errors.values():
            raise error
        return self.nbytes

    def unfinished(self) -> frozenset[int] | None:
        """As in the interface, by position among all inflows of the feed."""
        left: set[int] = set()
        for relay in self._errors:
            places = self._feed.places(relay)
            half = self._ran[relay].unfinished() if relay in self._ran else None
            left.update(places if half is None else (places[place] for place in half))
        return frozenset(left)

    def _run(self, relay: str | None, relayed: bool) -> None:
        try:
            if relayed and relay is not None:
                try:
                    self._run_one(relay, True)
                    return
                except EthaRayError:
                    self.lost.add(relay)
            self._run_one(relay, False)
        except BaseException as error:  # raised again on the thread that waits
            self._errors[relay] = error

    def _run_one(self, relay: str | None, relayed: bool) -> None:
        self._ran.pop(relay, None)
        program = self._feed.program(relay, relayed)
        self._ran[relay] = program
        program.run()
