"""Testing what is built on etha_ray: pytest fixtures (`plugin`), and what they are made of. See docs/testing.md.

Importing this loads neither torch nor Ray: pytest does it at each start.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from etha_ray.testing.calls import eventually, succeed, together

if TYPE_CHECKING:
    from etha_ray.testing.bus import TensorBus
    from etha_ray.testing.rays import RayUnderTest

__all__ = ["RayUnderTest", "TensorBus", "eventually", "succeed", "together"]

_MODULES = {"RayUnderTest": "rays", "TensorBus": "bus"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
