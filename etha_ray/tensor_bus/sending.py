"""The sending side of a batch: what it announced, and who has taken it. Owned by the agent's loop."""

from __future__ import annotations

from etha_ray.errors import error_class
from etha_ray.tensor_bus.bus import Member, tell
from etha_ray.tensor_bus.history import Flow, flow_key
from etha_ray.tensor_bus.messages import DataRead, DataReady, DataRefused, DataRevoked, DataStands, DataTaken
from etha_ray.tensor_bus.transfer_state import TransferState, UnderWay


class Sending:
    """The sends of ``member``, one at a time: ``sequence`` is the number of the last one."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.sequence = 0

    def announce(self, transfer: UnderWay) -> None:
        """Tell every receiver that the data may be read now."""
        member = self._member
        targets = member.registered.targets
        transfer.state = TransferState.ANNOUNCED
        if not transfer.announced:
            transfer.announced = True
            member.number(transfer)
        self.sequence += 1
        transfer.outstanding = set(targets)
        transfer.flows = tuple(
            Flow(flow_key(member.registration, registration, self.sequence), peer.name, peer.bytes)
            for registration, peer in targets.items()
        )
        more = {"version": transfer.version, "chosen": transfer.command.version is not None, "send": transfer.send}
        for registration, peer in targets.items():
            tell(member, peer, DataReady, member.registration, registration, self.sequence, **more)
        if not transfer.outstanding:
            member.finish(None)

    def revoke(self, transfer: UnderWay) -> None:
        """Take back what was announced in this registration, from all that have not taken it; what they read now may change."""
        member = self._member
        for registration in transfer.outstanding & member.registered.targets.keys():
            tell(member, member.registered.targets[registration], DataRevoked, member.registration, registration, self.sequence)

    def on_read(self, message: DataRead) -> None:
        """A receiver on another host has read this side's data, and asks whether it still stands."""
        member, transfer = self._member, self._announced(message.sequence)
        peer = member.registered.targets.get(message.target)
        if peer is None:
            return
        if transfer is not None and message.target in transfer.outstanding:
            tell(member, peer, DataStands, member.registration, message.target, message.sequence, question=message.question)
        else:
            tell(member, peer, DataRevoked, member.registration, message.target, message.sequence)

    def on_taken(self, message: DataTaken) -> None:
        """A receiver has read this side's data."""
        transfer = self._announced(message.sequence)
        if transfer is None:
            return
        transfer.outstanding.discard(message.target)
        transfer.moved = max(transfer.moved, message.seconds)
        # Where numbers are counted on, receivers may have met others at a higher one.
        transfer.version = max(transfer.version, message.version)
        if not transfer.outstanding:
            self._member.finish(None)

    def on_refused(self, message: DataRefused) -> None:
        """A receiver will not read this side's data, so this send fails for all."""
        transfer = self._announced(message.sequence)
        if transfer is None:
            return
        transfer.outstanding.discard(message.target)
        self.revoke(transfer)
        self._member.used = max(self._member.used, message.count - 1)
        self._member.finish(error_class(message.kind)(message.message))

    def _announced(self, sequence: int) -> UnderWay | None:
        """The send with this number, if it is under way."""
        transfer = self._member.transfer
        return transfer if transfer is not None and transfer.state is TransferState.ANNOUNCED and sequence == self.sequence else None
