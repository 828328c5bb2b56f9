"""Which version of a batch one worker's tensors hold, and who waits for one.

Versions count the transfers of a batch, or are the sender's own numbers; they only grow. A receiver takes the version that its
senders announce, which must be the same, as it tells which of their sends belong together: some receivers may have taken a send that
was given up, and others not. Numbers that were chosen and differ are refused. Numbers that were only counted on differ where a rank
gave up a send: then the one behind is refused, told where the others are, and counts on from there. Members that meet anew count on
from the highest number that any of them knows, and a number that was counted once is not used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import AgentFailedError, BatchTornError, ConfigError, VersionMismatchError, VersionTimeoutError
from etha_ray.tensor_bus.commands import HIGHEST_VERSION, WaitVersion
from etha_ray.tensor_bus.waits import Waits

_SHOWN = 16
"""Runs of positions that a message has room for."""


class Holding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one worker's tensors of one batch hold, as it stands in the agent's state file.

    There before a byte of them changes: a worker whose agent was killed in the midst of a copy finds its tensors torn.

    version: 0 until the batch was sent or received, and while it is torn. last: the highest version of a transfer that completed.
    taken: which sends the last receive took, one of each sender.
    torn: positions of the tensors that may hold bytes of two versions, as they were registered; and why.
    """

    version: int = 0
    last: int = 0
    taken: tuple[str, ...] = ()
    torn: tuple[int, ...] = ()
    why: str = ""

    @classmethod
    def decode(cls, data: bytes, batch_id: str) -> Holding:
        """Back from `encode`; raises `AgentFailedError` for bytes that are none."""
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise AgentFailedError(
                f"batch {batch_id!r}: what its agent's state file says of its version cannot be read ({error}): another program, or another"
                " version of etha_ray, writes to that file; close the batch, and register it again"
            ) from error

    def encode(self) -> bytes:
        """As it stands in the state file."""
        return _encoder.encode(self)

    def next_send(self, batch_id: str, chosen: int | None, used: int) -> int:
        """The version of the next send; ``chosen``: what the worker calls it; ``used``: the highest number known that one was sent under.

        Raises:
            ConfigError: the version that the worker chose is not above the last one.
            BatchTornError: the tensors are torn, and the worker does not say what version it has made of them.
        """
        if chosen is None:
            if self.torn:
                raise BatchTornError(
                    f"batch {batch_id!r} is torn ({self.why}), and must not be sent on: receive again, or write all its tensors"
                    " and say which version they hold now, transfer('send', version=...)"
                )
            chosen = max(self.last, used) + 1
        if not self.last < chosen <= HIGHEST_VERSION:
            raise ConfigError(f"batch {batch_id!r}: version {chosen} is not above {self.last}, its last one, and below 2**63")
        return chosen

    def complete(self, version: int, taken: tuple[str, ...] = ()) -> Holding:
        """After a transfer that completed; ``taken``: the sends that a receive took."""
        return Holding(version=version, last=max(version, self.last), taken=taken or self.taken)

    def tear(self, positions: tuple[int, ...], why: str) -> Holding:
        """Once bytes of tensors at these positions may have changed, and not all of them."""
        return Holding(version=0, last=self.last, taken=self.taken, torn=positions, why=why)


_encoder = msgspec.msgpack.Encoder()
_decoder: Decoder[Holding] = Decoder(Holding)


def check_version(version: int) -> int:
    """``version`` if it is one; raises ConfigError otherwise."""
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= HIGHEST_VERSION:
        raise ConfigError(f"version {version!r} is not an integer from 1 to 2**63 - 1")
    return version


def shown_positions(positions: Sequence[int]) -> str:
    """Positions of tensors, for a message: ``tensors 0-3, 7``."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] + 1 == position:
            runs[-1][1:] = [position]
        else:
            runs.append([position])
    shown = ["-".join(map(str, run)) for run in runs[:_SHOWN]] + (["..."] if len(runs) > _SHOWN else [])
    return f"{'tensor' if len(positions) == 1 else 'tensors'} {', '.join(shown)}"


@dataclass(frozen=True)
class Announced:
    """What one sender announced: the number of the send within its registration, its version, whether its worker chose that, and what
    this send is called whatever the registration."""

    sequence: int
    version: int
    chosen: bool
    send: str = ""


def agreed_version(batch_id: str, announced: Mapping[str, Announced], last: int) -> int:
    """The version that these senders send together, by name; ``last`` is the receiver's last one.

    Raises:
        VersionMismatchError: they chose different ones, or one counts further than the others chose.
    """
    chosen = {each.version for each in announced.values() if each.chosen}
    counted = max((each.version for each in announced.values() if not each.chosen), default=0)
    if not chosen:
        return min(max(counted, last + 1), HIGHEST_VERSION)
    version = max(chosen)
    if len(chosen) > 1 or counted > version:
        raise VersionMismatchError(
            f"batch {batch_id!r}: its senders do not send the same version: {_said(announced)}. Nothing was received; send again, with the"
            " same version on every rank of that side"
        )
    return version


def behind(batch_id: str, announced: Mapping[str, Announced]) -> tuple[set[str], VersionMismatchError]:
    """Which of these senders, that only count, are not where the others are, and what they are told."""
    counts = {name: each.version for name, each in announced.items() if not each.chosen}
    late = {name for name, count in counts.items() if len(counts) == len(announced) and count < max(counts.values())}
    return late, VersionMismatchError(
        f"batch {batch_id!r}: its senders are not at the same version: {_said(announced)}. Those ahead gave up a send, of which others may"
        " have taken their part: send again, to go on with them"
    )


def _said(announced: Mapping[str, Announced]) -> str:
    return ", ".join(f"{name} says {each.version}" for name, each in sorted(announced.items()))


class VersionWaits(Waits[WaitVersion]):
    """Commands that are answered once the tensors hold a version. On the agent's loop only."""

    def reach(self, version: int) -> None:
        """The tensors hold this version now."""
        for command in self._take(lambda command, _: command.version <= version):
            self.answer(command, version)

    def expire(self, now: float, state: str) -> None:
        """Answer those whose time is up; ``state`` says what is there and what is missing."""
        for command in self._expired(now):
            self.refuse(command, VersionTimeoutError(f"{state}; version {command.version} did not come within {command.timeout:g} s"))
