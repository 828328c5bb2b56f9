"""What one rank tells the others of what it holds: a table of names, shapes and layouts, and a notice that it is there."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import StoreError
from etha_ray.weights.layouts import Layouts
from etha_ray.weights.names import NamedTensor

_LARGEST = 1 << 28
"""Bytes that a table may have, unpacked: millions of tensors."""


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """A mesh and placements (`Layout.encode`), and the ranks of the side that the mesh consists of, in the order of its indices."""

    ranks: tuple[int, ...]
    layout: str


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor.

    names, parts: see `names.NamedTensor`. holding: its place among the table's holdings; -1 if it is whole on each rank that
    has it. shape: global if ``whole``, else of this rank's part.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    whole: bool
    holding: int


class Table(msgspec.Struct, frozen=True, array_like=True):
    """What one rank holds. Equal on ranks that hold the same parts of the same: the store then has it once."""

    holdings: tuple[Holding, ...]
    entries: tuple[Entry, ...]
    only: tuple[str, ...]
    strict: bool


class Notice(msgspec.Struct, frozen=True):
    """What one rank announces: how many its side has, and the digest of its table. ``token`` differs each time it begins anew."""

    token: str
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    table: str


_encoder = msgspec.msgpack.Encoder()
_table_decoder = Decoder(Table)
_notice_decoder = Decoder(Notice)


def make_table(tensors: Sequence[NamedTensor], layouts: Layouts, only: tuple[str, ...], strict: bool) -> Table:
    """The table of these tensors. Raises `LayoutError` for placements that do not fit."""
    holdings: dict[Holding, int] = {}
    entries = []
    for one in tensors:
        held = layouts.of(one.own, one.tensor)
        place = -1
        if held.layout is not None and held.ranks is not None:
            place = holdings.setdefault(Holding(held.ranks, held.layout.encode()), len(holdings))
        dtype = str(one.tensor.dtype).removeprefix("torch.")
        entries.append(Entry(one.names, one.parts, dtype, held.shape, held.whole, place))
    return Table(tuple(holdings), tuple(entries), only, strict)


def encode_table(table: Table) -> bytes:
    """As it is stored: names repeat themselves, and pack well."""
    return zlib.compress(_encoder.encode(table))


def decode_table(data: bytes) -> Table:
    """Back from `encode_table`. Raises `StoreError` for what is none."""
    try:
        return _table_decoder.decode(zlib.decompressobj().decompress(data, _LARGEST))
    except (zlib.error, msgspec.DecodeError) as error:
        raise StoreError(f"a table of weights cannot be read ({error}): run the same version of etha_ray on both sides") from error


def encode_notice(notice: Notice) -> bytes:
    """As it is announced."""
    return _encoder.encode(notice)


def decode_notice(data: bytes) -> Notice:
    """Back from `encode_notice`. Raises `StoreError` for what is none."""
    try:
        return _notice_decoder.decode(data)
    except msgspec.DecodeError as error:
        raise StoreError(f"a notice of weights cannot be read ({error}): run the same version of etha_ray on both sides") from error
