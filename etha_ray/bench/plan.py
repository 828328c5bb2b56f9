"""``bench plan``: what one agent's plan of a very large model costs, and how that grows with the ranks on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etha_ray.bench.agent_plan import AgentPlan, Role, measure
from etha_ray.bench.figures import BenchResult, Figure, median, progress
from etha_ray.bench.moe import EXPERTS, LAYERS, SOURCE_EP, TARGET_TP, Form, Moe
from etha_ray.errors import ConfigError

RANKS = (64, 256, 1024, 4096)
_MAIN = 1024
"""Source ranks that the goals are for."""
_SECONDS = 1.0
_PEAK_MIB = 286.0  # 300 MB
_REPEATS = 3


def run_plan(ranks: Sequence[int] = RANKS) -> BenchResult:
    """Measure for each number of source ranks the costliest of six agents: the first, middle and last of both sides. Each of them
    plans three times, in processes that have planned nothing before; the median time and the highest peak count.

    The main figures are those for 1,024 source ranks, or for the most where that is not among ``ranks``; for these the model
    is also planned with a tensor per expert matrix.

    Raises `ConfigError` for numbers of ranks that the model cannot be laid out on, `BenchError` when a plan cannot be made.
    """
    if not ranks:
        raise ConfigError("no numbers of ranks: give at least one")
    models = [Moe(number) for number in dict.fromkeys(ranks)]  # all are checked before the first is measured
    main = next((model for model in models if model.ranks == _MAIN), max(models, key=lambda model: model.ranks))
    found = {model.ranks: _costliest(model.ranks, "stacked") for model in models}
    matrices = _costliest(main.ranks, "matrices")
    figures = _main_figures(main, found[main.ranks], matrices)
    for number, plan in found.items():
        figures += _growth(number, plan)
    return BenchResult(bench="plan", figures=figures, ratios=[])


def _costliest(ranks: int, form: Form) -> AgentPlan:
    progress(f"{ranks} to {ranks // 2} ranks, {form} experts")
    roles: tuple[tuple[Role, int], ...] = (("source", ranks), ("target", ranks // 2))
    agents = [(role, position) for role, size in roles for position in (0, size // 2, size - 1)]
    plans = [_median([measure(ranks, form, role, position) for _ in range(_REPEATS)]) for role, position in agents]
    # Of each figure the highest, which need not be the same agent's.
    return AgentPlan(
        seconds=max(plan.seconds for plan in plans),
        cpu_seconds=max(plan.cpu_seconds for plan in plans),
        peak_mib=max(plan.peak_mib for plan in plans),
        tensors=plans[0].tensors,
        routes=max(plan.routes for plan in plans),
        boxes=max(plan.boxes for plan in plans),
    )


def _median(repeats: list[AgentPlan]) -> AgentPlan:
    return replace(
        repeats[0],
        seconds=median([plan.seconds for plan in repeats]),
        cpu_seconds=median([plan.cpu_seconds for plan in repeats]),
        peak_mib=max(plan.peak_mib for plan in repeats),
    )


def _main_figures(model: Moe, stacked: AgentPlan, matrices: AgentPlan) -> list[Figure]:
    layouts = (
        f"{LAYERS} layers from {model.ranks} ranks (FSDP {model.fsdp} × EP {SOURCE_EP}) to {model.ranks // 2} "
        f"(EP {model.target_ep} × TP {TARGET_TP}), {EXPERTS} experts a layer stacked"
    )
    each = "the same with a tensor for each expert's matrix, held in explicit pieces"
    return [
        Figure("seconds", stacked.seconds, f"one agent's whole plan, the slowest of six agents: {layouts}", reach=_SECONDS),
        Figure("cpu_seconds", stacked.cpu_seconds, "of these, on the CPU: the rest is other processes' work on this machine"),
        Figure(
            "peak_mib",
            stacked.peak_mib,
            "resident memory that it takes, above that before planning; equal tensors share routes",
            reach=_PEAK_MIB,
        ),
        Figure("tensors_count", stacked.tensors, "parameters"),
        Figure("matrices_seconds", matrices.seconds, each, reach=_SECONDS),
        Figure("matrices_cpu_seconds", matrices.cpu_seconds, "of these, on the CPU"),
        Figure("matrices_peak_mib", matrices.peak_mib, "its memory", reach=_PEAK_MIB),
        Figure("matrices_tensors_count", matrices.tensors, "its parameters"),
        Figure("matrices_routes_count", matrices.routes, "its routes of one agent"),
    ]


def _growth(ranks: int, plan: AgentPlan) -> list[Figure]:
    return [
        Figure(f"ranks_{ranks}_seconds", plan.seconds, f"one agent's plan, {ranks} to {ranks // 2} ranks, stacked experts"),
        Figure(f"ranks_{ranks}_cpu_seconds", plan.cpu_seconds, "of these, on the CPU"),
        Figure(f"ranks_{ranks}_peak_mib", plan.peak_mib, "its memory"),
        Figure(f"ranks_{ranks}_routes_count", plan.routes, "routes that an agent has at most, all tensors together"),
        Figure(f"ranks_{ranks}_boxes_count", plan.boxes, "boxes in these: the copies of one sync"),
        Figure(f"ranks_{ranks}_us_per_route", plan.cpu_seconds * 1e6 / plan.routes, "CPU time over routes"),
    ]
