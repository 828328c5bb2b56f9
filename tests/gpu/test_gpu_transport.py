"""What a GPU's transport does beyond the contract: the CPU's side, lanes, comparing, and what comes over the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from etha_ray.accelerator import CudaAccelerator
from etha_ray.errors import IntegrityError
from etha_ray.transport import Copy, MappedTransport
from etha_ray.transport.checked import CheckedTransport
from etha_ray.transport.joint import Move, prepare
from etha_ray.transport.kernels import KernelTransport
from etha_ray.transport.network import RemoteRegion
from tests.contracts.transport import bits, random_tensor
from tests.net.pair import Pair


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def transport(request: pytest.FixtureRequest, cuda: CudaAccelerator) -> Iterator[KernelTransport]:
    with contextlib.closing(KernelTransport(cuda, MappedTransport(1), kernels=request.param)) as transport:
        yield transport


def both_ways(device: torch.device) -> list[Copy]:
    """Copies from the CPU, to it, and beside the device; contiguous and not; with casts and without."""
    copies = []
    for from_device, to_device in ((False, True), (True, False), (False, False), (True, True)):
        for number, (one, other) in enumerate([(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]):
            for cut in (slice(None), slice(3, 40)):
                source = torch.randn(70, 50, dtype=one)[:, cut]
                target = torch.zeros(70, 60, dtype=other)[:, number : number + source.shape[1]]
                copies.append(Copy((source.to(device) if from_device else source,), target.to(device) if to_device else target))
    return copies


def test_between_a_gpu_and_the_cpu(transport: KernelTransport, cuda: CudaAccelerator) -> None:
    copies = both_ways(cuda.device)
    program = transport.prepare(copies)
    for _ in range(2):
        assert program.run() == program.nbytes
        assert all(bits(copy.sources[0].cpu().to(copy.target.dtype)) == bits(copy.target) for copy in copies)
        for copy in copies:
            copy.target.zero_()
    assert program.unfinished() is not None


@pytest.mark.parametrize("op", ["sum", "max"])
def test_contributions_from_everywhere(transport: KernelTransport, cuda: CudaAccelerator, op: str) -> None:
    parts = [torch.randint(-50, 50, (300, 70)).to(torch.bfloat16) for _ in range(3)]
    wanted = sum(part.float() for part in parts) if op == "sum" else torch.stack(parts).amax(0)
    for where in ((True, True, True), (True, False, True), (False, False, True), (False, True, False)):
        for to_device in (True, False):
            sources = tuple(part.to(cuda.device) if there else part for part, there in zip(parts, where, strict=True))
            target = torch.zeros(300, 70, device=cuda.device if to_device else "cpu")
            transport.prepare([Copy(sources, target, op)]).run()  # type: ignore[arg-type]
            assert torch.equal(target.cpu(), wanted.to(torch.bfloat16).float())


def test_a_run_waits_for_what_was_handed_over_before(transport: KernelTransport, cuda: CudaAccelerator) -> None:
    source, target = torch.zeros(1 << 20, device=cuda.device), torch.zeros(1 << 20, device=cuda.device)
    program = transport.prepare([Copy((source,), target)])
    torch.cuda._sleep(50_000_000)
    source.fill_(7)
    program.run()
    assert (target == 7).all()


def test_enqueued_programs_follow_one_another(transport: KernelTransport, cuda: CudaAccelerator) -> None:
    """Packed, and unpacked on another lane, while the CPU waits for neither."""
    source = random_tensor((512, 1024), torch.bfloat16).to(cuda.device)
    staging = torch.zeros(512 * 100, dtype=torch.bfloat16, device=cuda.device)
    target = torch.zeros(512, 300, dtype=torch.bfloat16, device=cuda.device)
    pack = transport.prepare([Copy((source[:, 7:107],), staging.view(512, 100))])
    unpack = transport.prepare([Copy((staging.view(512, 100),), target[:, 200:])])
    pack.run()  # a kernel that is launched first may be loaded then, which may wait for all that the GPU does
    unpack.run()
    target.zero_()
    staging.zero_()
    one, two = cuda.lane(), cuda.lane()
    one.after(cuda.current())
    with one.current():
        torch.cuda._sleep(1_000_000_000)
    pack.enqueue(one)
    two.after(one)
    unpack.enqueue(two)
    assert not one.done()
    two.wait()
    assert one.done()
    assert bits(target[:, 200:]) == bits(source[:, 7:107])
    assert not target[:, :200].any()


def test_copies_are_compared_where_they_are(transport: KernelTransport, cuda: CudaAccelerator) -> None:
    copies = [copy for copy in both_ways(cuda.device) if copy.is_plain]
    program = CheckedTransport(transport).prepare(copies)
    assert program.run() == program.nbytes
    program._program = transport.prepare(copies[:2])  # type: ignore[attr-defined]  # one that leaves out most
    for copy in copies:
        copy.target.zero_()
    with pytest.raises(IntegrityError, match="copy 2 "):
        program.run()
    assert program.unfinished() == frozenset(range(2, len(copies)))


def test_from_another_host_to_a_gpu(transport: KernelTransport, cuda: CudaAccelerator) -> None:
    source, here = torch.randn(100_000), torch.randn(100_000, device=cuda.device)
    targets = [torch.zeros(100_000, device=cuda.device) for _ in range(2)]
    with contextlib.closing(Pair()) as pair:
        pair.owner.export("x", [source])
        remote = RemoteRegion(pair.address, "x", 0, (0,), (100_000,), torch.float32)
        program = prepare([Move((remote,), targets[0]), Move((remote, here), targets[1], "sum")], transport, pair.reader)
        assert program.run() == program.nbytes
    assert torch.equal(targets[0].cpu(), source)
    assert torch.equal(targets[1].cpu(), source + here.cpu())
