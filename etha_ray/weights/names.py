"""Which tensors of a model take part, and what they are called between the two sides."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from etha_ray.errors import ConfigError

Source: TypeAlias = "nn.Module | Mapping[str, torch.Tensor]"
"""What can be published, and pulled into: a module, or tensors by name as in a state dict."""

Rename: TypeAlias = "str | Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None] | None"
"""How own names become those that both sides use; see `shared_names`."""

_FUSED = {
    f"{whole}.{kind}": tuple(f"{part}.{kind}" for part in parts)
    for whole, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))
    for kind in ("weight", "bias")
}

PRESETS: Mapping[str, Mapping[str, str | Sequence[str]]] = {"llama": _FUSED, "qwen": _FUSED}
"""For ``rename=``, by name: an engine's fused qkv and gate_up projections, filled from a Hugging Face Llama's or Qwen's."""

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What torch.compile, activation checkpointing and FSDP put into names; the tensors are the same without."""


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """One tensor of this side.

    Attributes:
        own: what this side calls it.
        names: what both sides call it: one name, or several of a tied weight; none of one that is fused.
        parts: of a fused tensor, what both sides call its parts, which lie one after the other along dimension 0.
    """

    own: str
    tensor: torch.Tensor
    names: tuple[str, ...]
    parts: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from the others, the same on all ranks."""
        return self.names or self.parts


def named_tensors(source: Source, rename: Rename = None, buffers: bool = False) -> list[NamedTensor]:
    """All tensors of a model, each once.

    Args:
        source: a module (its parameters), or tensors by name (all of them).
        rename: see `shared_names`.
        buffers: a module's persistent buffers, too.

    Raises:
        ConfigError: two tensors get the same name, or a value is no tensor.
    """
    by_memory: dict[object, NamedTensor] = {}
    for own, tensor in _own_tensors(source, buffers).items():
        found = shared_names(own, rename)
        if found is None:
            continue
        names, parts = ((found,), ()) if isinstance(found, str) else ((), found)
        place = _memory(tensor), parts
        tied = by_memory.get(place)
        by_memory[place] = NamedTensor(own, tensor, names, parts) if tied is None else replace(tied, names=tied.names + names)
    found_all = list(by_memory.values())
    _check_distinct(found_all)
    return found_all


def among(tensors: Sequence[NamedTensor], only: Sequence[str]) -> list[NamedTensor]:
    """Those that both sides call, or a part of which they call, something that fits ``only``. Raises `ConfigError` if there are none."""
    kept = [one for one in tensors if any(fits(name, only) for name in one.key)]
    if not kept:
        what = f"none of {len(tensors)} tensors fits only={list(only)}" if tensors else "there are no tensors"
        raise ConfigError(f"{what}: nothing would cross. Names between the sides begin with {[one.key[0] for one in tensors[:3]]}")
    return kept


def shared_names(own: str, rename: Rename) -> str | tuple[str, ...] | None:
    """What both sides call the tensor ``own``: a name, the names of the parts of a fused one, or None if it takes no part.

    A function is called with the own name, and answers that. In a mapping the longest key that is the own name, or its end from a
    dot on, is replaced by its value, and what is in front of it stays: ``{"qkv_proj.weight": ["q_proj.weight", ...]}``. Text
    names one of `PRESETS`. What wrappers such as torch.compile add to names is taken off before.
    """
    name = ".".join(part for part in own.split(".") if part not in _WRAPPERS)
    if rename is None:
        return name
    if isinstance(rename, str):
        if rename not in PRESETS:
            raise ConfigError(f"rename={rename!r} is no preset: give one of {sorted(PRESETS)}, a dict or a function")
        rename = PRESETS[rename]
    if isinstance(rename, Mapping):
        at = next((at for at in _ends(name) if name[at:] in rename), None)
        if at is None:
            return name
        new, front = rename[name[at:]], name[:at]
        return front + new if isinstance(new, str) else tuple(front + part for part in new)
    answer = rename(name)
    return answer if answer is None or isinstance(answer, str) else tuple(answer)


def fits(name: str, only: Sequence[str]) -> bool:
    """Whether a name is among ``only``: patterns in which ``*`` stands for any text; without patterns every name is."""
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


def patterns(only: str | Iterable[str] | None) -> tuple[str, ...]:
    """``only=`` as patterns."""
    return () if only is None else (only,) if isinstance(only, str) else tuple(only)


def _own_tensors(source: Source, buffers: bool) -> dict[str, torch.Tensor]:
    if isinstance(source, nn.Module):
        found: dict[str, torch.Tensor] = dict(source.named_parameters(remove_duplicate=False))
        if buffers:
            found.update(_persistent_buffers(source))
        return found
    if not isinstance(source, Mapping):
        raise ConfigError(f"a {type(source).__name__} has no weights: give a torch.nn.Module, or a dict of tensors by name")
    for name, tensor in source.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{name!r} is a {type(tensor).__name__} and no tensor: leave it out of what you give")
    return dict(source)


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a state dict has; the others (rotary tables, masks) are computed, not learned."""
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _ends(name: str) -> Iterable[int]:
    """Where the ends of ``name`` from a dot on begin, the longest first."""
    yield 0
    yield from (at + 1 for at, letter in enumerate(name) if letter == ".")


def _memory(tensor: torch.Tensor) -> object:
    local = getattr(tensor, "_local_tensor", tensor)
    if local.layout != torch.strided or local.numel() == 0 or local.data_ptr() == 0:
        return id(tensor)
    return local.data_ptr(), tuple(local.shape), local.stride(), local.dtype


def _check_distinct(tensors: Sequence[NamedTensor]) -> None:
    owners: dict[str, str] = {}
    for one in tensors:
        for name in (*one.names, *one.parts):
            if name in owners:
                raise ConfigError(f"{owners[name]!r} and {one.own!r} are both called {name!r} between the sides: correct rename=")
            owners[name] = one.own
