"""What reader and owner say to one another. Bytes of tensors follow a `Data` header on a stream, or go by a communicator; all else is
small.

The messages of a run by communicator are on the channel. What one end hands over to its device waits there for the other end, so neither
hands over what the other will not: the reader asks (`Pull`), the owner says of each round that it sends it (`Launched`), and only then the
reader receives it. The owner may end a run after any round (`Ended`), and does when the reader asks for it (`Stop`): both have then handed
over the same, and the communicator can be used again.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import torch

from etha_ray.decoding import Decoder

CONTROL = "tensors"
"""The service whose channel carries all but the streams' messages, and says by its heartbeats who lives."""

STREAM = "tensor bytes"
"""The service of the streams. Their hello is the channel's: a session's random id."""

SESSION_BYTES = 16


class WireRegion(msgspec.Struct, frozen=True, array_like=True):
    """A region of an exported tensor; ``dtype`` is the tensor's, ``wire`` the one that travels, by name."""

    export: str
    index: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str
    wire: str
    on_device: bool
    """The target is in the memory of the reader's device, and the reader can receive it there."""


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """The regions of a program, to be cut into buckets. Answered by `Prepared` or `Rejected`."""

    program: int
    bucket_size: int
    regions: list[WireRegion]
    checked: bool
    """Every bucket is to come with a checksum."""
    round_size: int
    """Bytes of messages that the reader can receive by a communicator at a time; 0 where it has none."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """The program is not run any more. Not answered."""

    program: int


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Send what the program has for the communicator. Answered by any number of `Launched`, and then `Ended`."""

    program: int
    run: int
    """The reader's number for it: they grow."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Send no more of this run. Its `Ended` still comes; it may be over already."""

    run: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The owner knows the session: streams may be opened."""


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The program can be run."""

    program: int
    paired: list[bool]
    """Which of its regions go by the communicator: both ends cut these, and the others, into buckets."""
    bucket_size: int
    """What both ends can stage: what was asked for, or less."""
    round_size: int
    """Of what goes by the communicator: what both ends can have under way at a time. It bounds the buckets too."""
    lacks: str
    """Why what is on both ends' devices does not go by the communicator; nothing if it does."""


class Join(msgspec.Struct, frozen=True, tag=True):
    """Join the session's communicator. There is one from the first program on that needs it."""

    unique_id: bytes


class Launched(msgspec.Struct, frozen=True, tag=True):
    """The run's next round is being sent."""

    run: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """All rounds of the run that were launched have been sent. It is complete if ``kind`` is empty."""

    run: int
    kind: str
    """A class of `etha_ray.errors`."""
    message: str
    checksums: list[int]
    """Of each message, where the program is checked."""


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The communicator cannot be used any more, and with it the session; ``kind`` is a class of `etha_ray.errors`."""

    kind: str
    message: str


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The program cannot be run; ``kind`` is a class of `etha_ray.errors`."""

    program: int
    kind: str
    message: str


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """Send this bucket. Answered by `Data` or `Failed`, in the order of the requests of a stream."""

    program: int
    bucket: int


class Data(msgspec.Struct, frozen=True, tag="d", array_like=True):
    """The bucket's bytes follow; ``checksum`` is theirs, where the program is checked."""

    nbytes: int
    checksum: int | None


class Failed(msgspec.Struct, frozen=True, tag="f", array_like=True):
    """The bucket cannot be sent; ``kind`` is a class of `etha_ray.errors`."""

    kind: str
    message: str


FromReader: TypeAlias = Prepare | Release | Pull | Stop | Broken
FromOwner: TypeAlias = Ready | Prepared | Rejected | Join | Launched | Ended | Broken

encode = msgspec.msgpack.Encoder().encode
from_reader: Decoder[FromReader] = Decoder(FromReader)
from_owner: Decoder[FromOwner] = Decoder(FromOwner)
fetches = Decoder(Fetch)
answers: Decoder[Data | Failed] = Decoder(Data | Failed)

MAX_REASON = 3000
"""Characters of a message in `Failed`: a frame's header has a limit."""


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``torch.<dtype>``."""
    return str(dtype).removeprefix("torch.")


def wire_dtype(source: torch.dtype, target: torch.dtype) -> torch.dtype:
    """What travels: the narrower of the two, the source's where they are as wide. The other end casts."""
    return target if target.itemsize < source.itemsize else source
