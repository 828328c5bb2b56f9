"""``bench small``: what a transfer costs when bytes do not: many small tensors, and one of 1 MiB."""

from __future__ import annotations

from functools import partial

from etha_ray.bench.bus import open_bus
from etha_ray.bench.figures import BenchResult, Figure, Ratio, interleaved, median, percentile, progress
from etha_ray.bench.processes import call_all
from etha_ray.bench.ray_baseline import RayObjects, open_ray
from etha_ray.bench.workload import distinct, uniform
from etha_ray.errors import ConfigError

_TENSOR_BYTES = 4096
_ONE_BYTES = 1 << 20
_MANY, _ONE, _DISTINCT = "many", "one", "distinct"


def run_small(tensors: int = 10_000, steps: int = 20, single_count: int = 1000) -> BenchResult:
    """Measure ``steps`` syncs of ``tensors`` tensors of 4 KiB and ``single_count`` of one tensor of 1 MiB, in turns with Ray.

    Raises `ConfigError` for numbers below 1, `BenchError` when a worker fails or wrong bytes arrive.
    """
    if steps < 1 or single_count < steps:
        raise ConfigError(f"{steps} steps and {single_count} single transfers: give at least 1 step, and no fewer single transfers")
    many, one = uniform(tensors, _TENSOR_BYTES), uniform(1, _ONE_BYTES)
    singles = single_count // steps
    with open_bus(2) as bus, open_ray(4, 4 * (many.moved_bytes + one.moved_bytes)):
        progress(f"registering {tensors} tensors")
        register_s = bus.register(_MANY, many)
        bus.register(_ONE, one)
        call_all(bus.agents, "proving")
        distinct_s = bus.register(_DISTINCT, distinct(max(1, tensors // 10), _TENSOR_BYTES))
        proving_s = max(call_all(bus.agents, "proving"))
        for batch_id, workload in ((_MANY, many), (_ONE, one)):
            bus.verified_sync(batch_id, workload, version=1)
        ray_many, ray_one = RayObjects(many), RayObjects(one)
        samples = interleaved(
            steps,
            {
                "many": partial(bus.sync, _MANY, many),
                "one": partial(bus.sync, _ONE, one, count=singles),
                "ray many": ray_many.sync,
                "ray one": partial(ray_one.sync, count=max(1, singles // 10)),
            },
        )
        for batch_id, workload in ((_MANY, many), (_ONE, one)):
            bus.verified_sync(batch_id, workload, version=2)
    each = {name: [second * 1e6 / tensors for second in samples[name]] for name in ("many", "ray many")}
    single = {name: [second * 1e6 for second in samples[name]] for name in ("one", "ray one")}
    return BenchResult(
        bench="small",
        figures=[
            Figure("per_tensor_us", median(each["many"]), f"one of {tensors} tensors of 4 KiB, in one sync", reach=10.0),
            Figure("many_sync_ms", median(samples["many"]) * 1e3, "all of them, first call to last completion"),
            Figure("many_register_s", register_s, "registering them, once"),
            Figure(
                "proof_percent", 100 * proving_s / distinct_s, "of registering a tenth as many, all distinct, is proving plans", reach=1.0
            ),
            Figure("one_mib_p50_us", median(single["one"]), "one tensor of 1 MiB, first call to last completion", reach=1000.0),
            Figure("one_mib_p99_us", percentile(single["one"], 99), "the same, 99th percentile"),
            Figure("ray_per_tensor_us", median(each["ray many"]), "one small tensor through Ray's object store"),
            Figure("ray_one_mib_p50_us", median(single["ray one"]), "1 MiB through Ray's object store"),
            Figure("tensors_count", tensors, "small tensors"),
        ],
        ratios=[
            Ratio("ray_objects_many", median(each["ray many"]) / median(each["many"]), "Ray's object store over ours, small tensors"),
            Ratio("ray_objects_one", median(single["ray one"]) / median(single["one"]), "Ray's object store over ours, 1 MiB"),
        ],
    )
