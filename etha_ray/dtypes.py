"""What a dtype may become, and how several contributions of one dtype are combined: pure functions, no tensors.

**Casts.** A cast changes the dtype and means to keep the values. `cast_loss` says what it cannot keep:

===========  =========  ==================  ===================  =========
from \\ to    bool       integer             float                complex
===========  =========  ==================  ===================  =========
bool         same       kept                kept                 kept
integer      **lossy**  kept, or **lossy**  rounded              rounded
float        **lossy**  **lossy**           kept or rounded      rounded
complex      **lossy**  **lossy**           **lossy**            rounded
===========  =========  ==================  ===================  =========

*Rounded* is no loss here: the result is the nearest value the target has, and a value beyond its range becomes infinite or
NaN, which shows (float32 to bfloat16, int64 to float32, bfloat16 to float8); but on GPUs a torch for CUDA 13.2 or newer makes 448,
the largest, of what is beyond float8_e4m3fn in float32 (ATen/native/cuda/Copy.cu). It needs no permission. *Lossy* drops what a
value is (a fraction, an imaginary part, a magnitude), or turns it into an unrelated one. An integer dtype is one of these
too, unless it has every value of the other: what does not fit int32 wraps around to some other number, and nothing shows it.
So is float8_e8m0fnu, which has neither sign nor zero, as the target of anything but itself.

Dtypes that hold no single numbers (bits, float4_e2m1fn_x2, integers below a byte) are moved, never cast.

**Combining.** As torch.distributed.all_reduce does: sums of integers wrap around, for bool a sum is "or" and a product "and",
and a NaN wins every max and min. Floats below 32 bits are combined in float32, and rounded once; so are float8 kinds, which
all_reduce does not take.
"""

from __future__ import annotations

from functools import cache

import torch

from etha_ray.layout import CombineOp as CombineOp  # handed on: transports know no layouts

DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype) and "q" not in str(v)}
"""Every dtype of this torch whose memory can be shared, by its name (``"bfloat16"``)."""

_BELOW_FLOAT32 = {torch.float16, torch.bfloat16} | {dtype for name, dtype in DTYPES.items() if name.startswith("float8_")}
_FLOATS = _BELOW_FLOAT32 | {torch.float32, torch.float64}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}
_SIGNED = {torch.int8, torch.int16, torch.int32, torch.int64}
_INTEGERS = _SIGNED | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_KINDS: dict[torch.dtype, str] = {
    torch.bool: "truth values",
    **dict.fromkeys(_INTEGERS, "integers"),
    **dict.fromkeys(_FLOATS, "real numbers"),
    **dict.fromkeys(_COMPLEX, "complex numbers"),
}
_ORDER = ("truth values", "integers", "real numbers", "complex numbers")

CASTABLE = frozenset(_KINDS)
"""The dtypes that can be cast to one another."""

COMBINABLE = frozenset({torch.bool, torch.uint8} | _SIGNED | _FLOATS - {getattr(torch, "float8_e8m0fnu", None)} | _COMPLEX)
"""The dtypes whose contributions can be combined."""


@cache
def cast_loss(source: torch.dtype, target: torch.dtype) -> str | None:
    """What a cast from ``source`` to ``target`` cannot keep, in words; None if nothing, by the table above.

    Both must be in `CASTABLE`, or the same.
    """
    if source == target:
        return None
    kind, other = _KINDS[source], _KINDS[target]
    if _ORDER.index(other) < _ORDER.index(kind):
        return f"{other} cannot keep {kind}"
    if kind == other == "integers":
        have, wanted = torch.iinfo(target), torch.iinfo(source)
        if have.min > wanted.min or have.max < wanted.max:
            return f"it holds {have.min} to {have.max}, and what does not fit wraps around to another number"
    if str(target) == "torch.float8_e8m0fnu":
        return "it has powers of two only, and neither sign nor zero"
    return None


@cache
def combine_problem(dtype: torch.dtype, op: CombineOp, divisor: int = 1) -> str | None:
    """Why contributions of ``dtype`` cannot be combined by ``op``, in words; None if they can."""
    if dtype not in COMBINABLE:
        return f"{dtype} cannot be combined; register it as one of {', '.join(sorted(map(_name, COMBINABLE)))}"
    if dtype in _COMPLEX and op != "sum":
        return f"complex numbers can be combined by sum and avg, not by {op}"
    if divisor != 1 and dtype not in _FLOATS | _COMPLEX:
        return f"an avg of {dtype} is no {dtype}; use sum, or a floating point dtype"
    return None


def combine_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which contributions of ``dtype`` are combined."""
    if dtype in _BELOW_FLOAT32:
        return torch.float32
    return torch.complex64 if dtype == torch.complex32 else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
