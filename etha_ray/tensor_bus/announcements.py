"""What the senders of a batch have announced to one receiver, until it is taken, taken back or refused. Owned by the agent's loop."""

from __future__ import annotations

from etha_ray.errors import VersionMismatchError
from etha_ray.tensor_bus.bus import Member, tell
from etha_ray.tensor_bus.messages import DataReady, DataRefused, DataTaken
from etha_ray.tensor_bus.versions import Announced, agreed_version, behind


class Announcements(dict[str, Announced]):
    """What ``member`` may read now, by the sender's registration."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self._member = member

    @property
    def complete(self) -> bool:
        """Whether every sender's data is there to be read."""
        return all(source in self for source in self._member.registered.sources)

    def add(self, message: DataReady) -> None:
        """A sender announces its data."""
        self[message.source] = Announced(message.sequence, message.version, message.chosen, message.send)
        self.pass_over_taken()

    def pass_over_taken(self) -> None:
        """Senders that had not heard of it, when a member was lost, announce what was taken here: say so."""
        member = self._member
        for registration, announced in list(self.items()):
            peer = member.registered.sources.get(registration)
            if peer is not None and announced.send in member.holding.taken:
                del self[registration]
                tell(member, peer, DataTaken, registration, member.registration, announced.sequence, version=announced.version)

    def agreed(self) -> int | None:
        """The version that all senders send together, once all have announced; None if some were behind, and told to send again.

        Raises:
            VersionMismatchError: they never will be together; all of them were told.
        """
        member = self._member
        by_name = {peer.name: self[registration] for registration, peer in member.registered.sources.items()}
        late, error = behind(member.batch_id, by_name)
        if late:
            self._refuse(late, error, max(each.version for each in by_name.values()))
            return None
        try:
            return agreed_version(member.batch_id, by_name, member.holding.last)
        except VersionMismatchError as mismatch:
            self._refuse(set(by_name), mismatch)
            raise

    def _refuse(self, names: set[str], error: VersionMismatchError, count: int = 0) -> None:
        member = self._member
        for registration, peer in member.registered.sources.items():
            if peer.name in names:
                sequence = self.pop(registration).sequence
                more = {"kind": type(error).__name__, "message": str(error), "count": count}
                tell(member, peer, DataRefused, registration, member.registration, sequence, **more)
