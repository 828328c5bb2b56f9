"""What reader and owner say to one another. Bytes of tensors follow a `Data` header on a stream; all else is small."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import torch

from etha_ray.decoding import Decoder

CONTROL = "tensors"
"""The service whose channel carries `Prepare`, `Release` and their answers, and says by its heartbeats who lives."""

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


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """The regions of a program, to be cut into buckets. Answered by `Prepared` or `Rejected`."""

    program: int
    bucket_size: int
    regions: list[WireRegion]
    checked: bool
    """Every bucket is to come with a checksum."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """The program is not run any more. Not answered."""

    program: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The owner knows the session: streams may be opened."""


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The program can be run."""

    program: int


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


FromReader: TypeAlias = Prepare | Release
FromOwner: TypeAlias = Ready | Prepared | Rejected

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
