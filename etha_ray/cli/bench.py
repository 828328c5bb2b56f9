"""``etha-ray bench``: measure on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from etha_ray.bench import BenchResult, run_faults, run_gpu, run_network, run_plan, run_roundtrip, run_small, run_store, run_sync
from etha_ray.bench.gpu import SHAPES
from etha_ray.bench.processes import leaving_on_sigterm
from etha_ray.cli.failures import failed
from etha_ray.errors import EthaRayError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Measure on this machine, each figure beside its baseline in the same run."
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def roundtrip(
    count: Annotated[int, typer.Option(help="Round trips to measure.")] = 20_000,
    as_json: _Json = False,
) -> None:
    """A command that does nothing, worker to agent and back, against a Ray actor call.

    Example: [bold]etha-ray bench roundtrip --count 5000[/]
    """
    _show(lambda: run_roundtrip(count), as_json)


@app.command()
def sync(
    shape: Annotated[str, typer.Option(help='The model: "qwen3-0.6b", or "tiny" to try it out.')] = "qwen3-0.6b",
    src: Annotated[int, typer.Option(help="Ranks that hold FSDP shards.")] = 2,
    dst: Annotated[int, typer.Option(help="Ranks that hold tensor-parallel shards.")] = 2,
    dtype: Annotated[str, typer.Option(help="Element type.")] = "bfloat16",
    steps: Annotated[int, typer.Option(help="Syncs to measure.")] = 15,
    as_json: _Json = False,
) -> None:
    """A model's weights, FSDP shards to tensor-parallel shards, against the copy limit and Ray's object store.

    Example: [bold]etha-ray bench sync --shape tiny --src 4 --dst 2[/]
    """
    _show(lambda: run_sync(shape, src, dst, dtype, steps), as_json)


@app.command()
def small(
    tensors: Annotated[int, typer.Option(help="How many tensors of 4 KiB.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Syncs of them to measure.")] = 20,
    single_count: Annotated[int, typer.Option(help="Transfers of one tensor of 1 MiB to measure.")] = 1000,
    as_json: _Json = False,
) -> None:
    """Many tensors of 4 KiB in one sync, and one tensor of 1 MiB end to end.

    Example: [bold]etha-ray bench small --tensors 1000[/]
    """
    _show(lambda: run_small(tensors, steps, single_count), as_json)


@app.command()
def network(
    shape: Annotated[str, typer.Option(help='The model: "qwen3-0.6b", or "tiny" to try it out.')] = "qwen3-0.6b",
    src: Annotated[int, typer.Option(help="Ranks that hold FSDP shards.")] = 2,
    dst: Annotated[int, typer.Option(help="Ranks that hold tensor-parallel shards; the first one's are moved.")] = 2,
    dtype: Annotated[str, typer.Option(help="Element type.")] = "bfloat16",
    steps: Annotated[int, typer.Option(help="Transfers to measure.")] = 15,
    as_json: _Json = False,
) -> None:
    """A model's weights from one process to another over TCP, against gloo and one raw socket. Needs no Ray and no agents.

    Example: [bold]etha-ray bench network --shape tiny[/]
    """
    _show(lambda: run_network(shape, src, dst, dtype, steps), as_json)


@app.command()
def gpu(
    shape: Annotated[list[str] | None, typer.Option(help="A model; may be given several times. Qwen3-0.6B and 8B without it.")] = None,
    src: Annotated[int, typer.Option(help="Ranks that hold FSDP shards.")] = 2,
    dst: Annotated[int, typer.Option(help="Ranks that hold tensor-parallel shards.")] = 2,
    steps: Annotated[int, typer.Option(help="Runs to measure of each.")] = 15,
    tensors: Annotated[int, typer.Option(help="How many small tensors of 4 KiB.")] = 10_000,
    as_json: _Json = False,
) -> None:
    """Shards that change their layout and dtype within a GPU, against its copy rate and torch's calls. Needs a GPU, and no agents.

    Example: [bold]etha-ray bench gpu --shape qwen3-0.6b --json[/]
    """
    _show(lambda: run_gpu(shape or SHAPES, src, dst, steps, tensors), as_json)


@app.command()
def plan(
    ranks: Annotated[list[int] | None, typer.Option(help="Source ranks, multiples of 16; may be given several times.")] = None,
    as_json: _Json = False,
) -> None:
    """One agent's plan for a 671B mixture of experts (DeepSeek-V3), and how it grows with the ranks. Needs no Ray and no agents.

    Example: [bold]etha-ray bench plan --ranks 64 --ranks 1024[/]
    """
    _show(lambda: run_plan(*([tuple(ranks)] if ranks else [])), as_json)


@app.command()
def store(
    puts: Annotated[int, typer.Option(help="Puts to measure of each store, and as many gets.")] = 2000,
    etcd: Annotated[str | None, typer.Option(help="HOST:PORT of an etcd that serves; without it one is started here.")] = None,
    as_json: _Json = False,
) -> None:
    """The key-value stores: a put, a get, and from a put until another process's wait for it is over.

    Example: [bold]etha-ray bench store --json[/]
    """
    _show(lambda: run_store(puts, etcd), as_json)


@app.command()
def faults(
    count: Annotated[int, typer.Option(help="How often to measure each fault.")] = 5,
    as_json: _Json = False,
) -> None:
    """How soon a call hears of it: a worker or an agent that is killed, an agent or the store that stands still.

    Example: [bold]etha-ray bench faults --count 3 --json[/]
    """
    _show(lambda: run_faults(count), as_json)


def _show(run: Callable[[], BenchResult], as_json: bool) -> None:
    try:
        with leaving_on_sigterm():
            result = run()
    except EthaRayError as error:
        raise failed(error) from None
    if as_json:
        sys.stdout.write(json.dumps(result.as_dict()) + "\n")
    else:
        Console().print(result.table())
