"""What a receive runs: a program for what is read from senders, and for each relay one that reads from it, or from senders instead;
in stages where others read from here what has been received.

A relay that fails costs no receive: what it would have passed on is then read from the senders, within the same run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from etha_ray.errors import CommunicatorError, EthaRayError, NoTransportError, PeerLostError
from etha_ray.tensor_bus.executor import Inflow
from etha_ray.transport.base import CopyProgram
from etha_ray.transport.joint import Move

logger = logging.getLogger(__name__)

STAGE_BYTES = 16 << 20
"""What a stage has at least: so much that beginning the next one costs little beside it."""

Prepare: TypeAlias = Callable[[Sequence[Move]], CopyProgram]


@dataclass(frozen=True)
class Fed:
    """An inflow at ``position`` in ``pair`` (`Inflow.key`), and the registration of the relay it may be read from, if there is one."""

    inflow: Inflow
    relay: str | None = None
    pair: str = ""
    position: int = 0


Upto: TypeAlias = dict[str, int]
"""The position in each pair up to which all is there."""


class Feed:
    """The programs that fill one set of targets: a worker's tensors, or the second memory of an atomic receive.

    Where ``divided`` they are run in `stages`, of ascending positions, so that what one member has received another can read already.
    ``target`` gives where an inflow goes. ``prepare`` makes programs: it is called when one is run first, on the thread that runs it,
    or by `warm`.
    """

    def __init__(self, fed: Sequence[Fed], target: Callable[[Inflow], torch.Tensor], prepare: Prepare, *, divided: bool = False) -> None:
        self._target, self._prepare, self._fed = target, prepare, list(fed)
        self._stages: list[dict[str | None, list[int]]] = [{None: []}]
        self._ends: list[Upto] = [{}]
        size = 0
        for place, each in enumerate(fed):
            begins = place > 0 and (each.pair, each.position) != (fed[place - 1].pair, fed[place - 1].position)
            if divided and begins and size >= STAGE_BYTES:
                self._stages.append({None: []})
                self._ends.append(dict(self._ends[-1]))
                size = 0
            self._stages[-1].setdefault(each.relay, []).append(place)
            self._ends[-1][each.pair] = each.position + 1
            size += each.inflow.move.target.nbytes
        self._programs: dict[tuple[int, str | None, bool], CopyProgram] = {}

    @property
    def stages(self) -> int:
        """How many there are, at least one."""
        return len(self._stages)

    def upto(self, stages: int) -> Upto:
        """What is there once so many stages have been run."""
        return self._ends[stages - 1] if stages else {}

    def needs(self, stage: int, relay: str, there: Upto) -> bool:
        """Whether more must be there at ``relay`` than is, before ``stage`` can be read through it."""
        places = self._stages[stage].get(relay, ())
        return any(self._fed[place].position >= there.get(self._fed[place].pair, 0) for place in places)

    def warm(self) -> set[str]:
        """Prepare what is run when all goes well; the relays that cannot be read from."""
        unreachable = set[str]()
        for stage, parts in enumerate(self._stages):
            for relay in parts:
                try:
                    if relay not in unreachable:
                        self.program(stage, relay, relay is not None)
                except (PeerLostError, NoTransportError, CommunicatorError) as error:
                    if relay is None:
                        raise
                    logger.warning("a receiver that should pass something on cannot be read from: %s", error)
                    unreachable.add(relay)
        return unreachable

    def reading(self, stage: int, through: Collection[str]) -> Reading:
        """Read a stage: through these relays, and of the others what they would pass on from the senders."""
        return Reading(self, [(stage, relay, relay in through) for relay in self._stages[stage]])

    def again(self, relays: Collection[str]) -> Reading:
        """Read from the senders what these relays would have passed on, in all stages."""
        return Reading(
            self, [(stage, relay, False) for stage, parts in enumerate(self._stages) for relay in sorted(set(relays) & parts.keys())]
        )

    def program(self, stage: int, relay: str | None, relayed: bool) -> CopyProgram:
        """Of what ``relay`` passes on: read from it, or from the senders; without a relay, what is always read from them."""
        if (stage, relay, relayed) not in self._programs:
            moves = []
            for place in self._stages[stage][relay]:
                inflow = self._fed[place].inflow
                move = inflow.relayed if relayed and inflow.relayed is not None else inflow.move
                moves.append(replace(move, target=self._target(inflow)))
            self._programs[stage, relay, relayed] = self._prepare(moves)
        return self._programs[stage, relay, relayed]

    def places(self, stage: int, relay: str | None) -> list[int]:
        """Which of the inflows that program fills, in its order."""
        return self._stages[stage].get(relay, [])

    def passed_on(self, relay: str) -> list[int]:
        """All inflows that ``relay`` may pass on."""
        return [place for place, each in enumerate(self._fed) if each.relay == relay]

    def after(self, stage: int) -> list[int]:
        """All inflows of later stages."""
        return [place for parts in self._stages[stage + 1 :] for places in parts.values() for place in places]


class Reading(CopyProgram):
    """One run of some of a feed's programs, at the same time. ``lost``: relays that failed in it, and were done without."""

    def __init__(self, feed: Feed, parts: Sequence[tuple[int, str | None, bool]]) -> None:
        self._feed, self._parts = feed, list(parts)
        self.lost: set[str] = set()
        self._errors: dict[tuple[int, str | None], BaseException] = {}
        self._ran: dict[tuple[int, str | None], CopyProgram] = {}

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
        for stage, relay in self._errors:
            places = self._feed.places(stage, relay)
            half = self._ran[stage, relay].unfinished() if (stage, relay) in self._ran else None
            left.update(places if half is None else (places[place] for place in half))
        return frozenset(left)

    def _run(self, stage: int, relay: str | None, relayed: bool) -> None:
        try:
            if relayed and relay is not None:
                try:
                    self._run_one(stage, relay, True)
                    return
                except EthaRayError as error:
                    logger.warning("what another receiver should have passed on is read from its senders: %s", error)
                    self.lost.add(relay)
            self._run_one(stage, relay, False)
        except BaseException as error:  # raised again on the thread that waits
            self._errors[stage, relay] = error

    def _run_one(self, stage: int, relay: str | None, relayed: bool) -> None:
        self._ran.pop((stage, relay), None)
        program = self._feed.program(stage, relay, relayed)
        self._ran[stage, relay] = program
        program.run()
