"""What worker processes do in the tests of publish and pull."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import etha_ray
from etha_ray.errors import EthaRayError
from etha_ray.testing import eventually
from etha_ray.weights import PushReport
from tests.tensor_bus.cluster import LONG

SIZES = {"vocabulary": 257, "layers": 2, "heads": 4, "head_size": 8, "mlp": 37}


def publish_trainer(state: dict[str, Any], rank: int, size: int, rendezvous: str) -> None:
    """A transformer that FSDP2 trains."""
    # Here, because FSDP takes seconds to import, and not all workers need it.
    from torch.distributed.device_mesh import init_device_mesh

    from actors.model import ModelConfig, ShardedTrainer

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    state["trainer"] = ShardedTrainer(ModelConfig(**SIZES), init_device_mesh("cpu", (size,)), total_steps=10)
    state["sender"] = etha_ray.publish(state["trainer"].weights, "policy", client=state["client"])


def train(state: dict[str, Any], rank: int, size: int, step: int) -> dict[str, Tensor]:
    """One step; all weights, whole."""
    from actors.text import load_corpus, train_batch

    state["trainer"].step(train_batch(load_corpus(), step=step, rank=rank, windows=1, length=16, seed=0))
    return {name: weight.full_tensor().detach() for name, weight in state["trainer"].weights.items()}


def publish_plain(state: dict[str, Any], value: float) -> None:
    state["sender"] = etha_ray.publish({"w": torch.full((3,), value)}, "plain", client=state["client"])


def pull_plain(state: dict[str, Any], replica: str) -> None:
    state["receiver"] = etha_ray.pull({"w": torch.zeros(3)}, "plain", client=state["client"], replica=replica, timeout=LONG)


def pull_rank(state: dict[str, Any], rank: int, size: int) -> None:
    state["receiver"] = etha_ray.pull({"w": torch.zeros(3)}, "plain", client=state["client"], rank=rank, world_size=size, timeout=LONG)


def push(state: dict[str, Any], rank: int, size: int) -> Any:
    return state["sender"].push(timeout=LONG)


def update(state: dict[str, Any]) -> int:
    return int(state["receiver"].update(LONG))


def close(state: dict[str, Any], rank: int, size: int) -> None:
    state["sender"].close()


# --- versions that can be told from one another, bit by bit


def numbers(version: int) -> dict[str, Tensor]:
    """What weights hold as ``version``: each element says which, and where it is."""
    places = torch.arange(2 * 4096)
    wide = {f"w{index}": places * 2**24 + version * 2**4 + index for index in range(6)}
    return {**wide, "narrow": (places[:257] + version).to(torch.int16).view(torch.bfloat16)}


def hold(tensors: dict[str, Tensor], version: int) -> bool:
    """Whether they are these, bit for bit."""
    return all(torch.equal(tensors[name].view(torch.uint8), right.view(torch.uint8)) for name, right in numbers(version).items())


def publish_numbers(state: dict[str, Any], replicas: int) -> None:
    state["weights"] = numbers(0)
    state["sender"] = etha_ray.publish(state["weights"], "numbers", client=state["client"], min_replicas=replicas)


def pull_numbers(state: dict[str, Any], replica: str) -> None:
    state["weights"] = numbers(0)
    state["receiver"] = etha_ray.pull(state["weights"], "numbers", replica=replica, client=state["client"], blocking=False)


def await_replicas(state: dict[str, Any], count: int) -> None:
    eventually(lambda: len(state["sender"].replicas) == count)


def push_numbers(state: dict[str, Any], version: int, straggler_timeout: float | None = None) -> PushReport:
    for name, tensor in numbers(version).items():
        state["weights"][name].copy_(tensor)
    report: PushReport = state["sender"].push(version, LONG, straggler_timeout)
    assert report.version == state["sender"].version == version
    return report


def update_numbers(state: dict[str, Any]) -> int:
    """What came, which is right."""
    receiver = state["receiver"]
    version = int(receiver.update(LONG))
    assert (receiver.version, receiver.torn) == (version, False)
    assert hold(state["weights"], version), f"these are not the bits of version {version}"
    return version


def interrupted(state: dict[str, Any], what: str) -> str:
    """Does what waits for the other side, until Ctrl-C; how that ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if what == "pull":
            more = {"client": state["client"], "replica": "half", "world_size": 2, "rank": 0, "timeout": LONG}
            etha_ray.pull(numbers(0), "numbers", **more)
        elif what == "push":
            state["sender"].push(timeout=LONG)
        else:
            state["receiver"].update(LONG)
    except (KeyboardInterrupt, EthaRayError) as error:
        return type(error).__name__
    return ""


def await_half(state: dict[str, Any], there: bool) -> None:
    """Until a publisher sees a replica of which one rank is there, or sees it no more."""
    eventually(lambda: ("half" in state["sender"]._seen.missing) == there)


def held(state: dict[str, Any]) -> tuple[int, bool]:
    """Which version a receiver says that it holds, and whether it is torn; what it says is right."""
    receiver = state["receiver"]
    while True:
        said = receiver.version, receiver.torn
        right = said[1] or hold(state["weights"], said[0])
        if said == (receiver.version, receiver.torn):  # else bytes came meanwhile
            assert right, f"these are not the bits of version {said[0]}"
            return said


def push_on(state: dict[str, Any], version: int, final: int, tries: int) -> tuple[list[BaseException], int]:
    """Push until all replicas have got one, each time as the next version, and then once more as ``final``.

    Which errors came before, at most ``tries``, and the version that came through. A call whose time is up has hung.
    """
    errors: list[BaseException] = []
    while True:
        try:
            report = push_numbers(state, version)
            if not report.failed:
                break
            errors += report.failed.values()
        except EthaRayError as error:
            errors.append(error)
        if len(errors) > tries or any(isinstance(error, TimeoutError) for error in errors):
            raise AssertionError(f"pushes do not go on: {errors!r}")
        version += 1
    assert push_numbers(state, final).failed == {}
    return errors, version


def update_on(state: dict[str, Any], final: int, tries: int) -> tuple[list[BaseException], list[int]]:
    """Take versions until ``final``. Which errors came, at most ``tries``, and which versions."""
    errors: list[BaseException] = []
    versions = [0]
    while versions[-1] != final:
        try:
            versions.append(update_numbers(state))
        except EthaRayError as error:
            errors.append(error)
            if len(errors) > tries or isinstance(error, TimeoutError):
                raise AssertionError(f"updates do not go on: {errors!r}") from error
    return errors, versions
