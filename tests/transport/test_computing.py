"""What torch is asked to compute; that it is right is in the transports' contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etha_ray.transport.computing import combine


class Divisors(TorchDispatchMode):
    """Where the divisors of all divisions are."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[torch.device] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div_.Tensor:
            self.devices.append(args[1].device)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_an_average_is_divided_where_it_is(dtype: torch.dtype) -> None:
    """By a number of the CPU a GPU would not divide: it multiplies by the reciprocal, which is another number at times."""
    target, *sources = (torch.empty(5, dtype=dtype, device="meta") for _ in range(4))
    with Divisors() as divisors:
        combine((target, *sources), "sum", 3)
    assert divisors.devices == [torch.device("meta")]
