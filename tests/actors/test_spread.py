"""Who sits where, on clusters as Ray describes them."""

from __future__ import annotations

from typing import Any

import pytest

from actors.spread import spread_over


def node(name: str, *, cpus: int = 4, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    resources = {key: float(count) for key, count in (("CPU", cpus), ("GPU", gpus)) if count}
    return {"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "workers", "seated"),
    [
        ([node("1")], 3, "111"),
        ([node("2"), node("3"), node("1")], 5, "11223"),
        ([node("1", cpus=0), node("2"), node("3")], 4, "2233"),
        ([node("1"), node("2", alive=False), node("3")], 2, "13"),
        ([node("1", cpus=0)], 2, "11"),
    ],
)
def test_nodes_with_cpus_get_as_many_workers(nodes: list[dict[str, Any]], workers: int, seated: str) -> None:
    spread = spread_over(nodes, "1", workers)
    assert "".join(spread.nodes) == seated
    assert spread.devices == {name: ["cpu"] * seated.count(name) for name in seated}
    seats = spread.seats("target", 1, workers - 1, "pool")
    assert [(seat.rank, seat.agent_rank, seat.node_id, seat.gpu) for seat in seats] == [
        (rank, rank + 1, seated[rank + 1], False) for rank in range(workers - 1)
    ]


def test_gpus_are_filled_node_by_node() -> None:
    spread = spread_over([node("1"), node("3", gpus=4), node("2", gpus=2)], "1", 3)
    assert "".join(spread.nodes) == "223"
    # Ray chooses which GPU a worker gets: all of a node's have an agent.
    assert spread.devices == {"2": ["cuda:0", "cuda:1"], "3": ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]}
    assert [(seat.agent_rank, seat.node_id, seat.gpu) for seat in spread.seats("source", 0, 3, "pool")] == [
        (None, "2", True),
        (None, "2", True),
        (None, "3", True),
    ]


def test_too_few_gpus_leave_all_on_cpus() -> None:
    spread = spread_over([node("1"), node("2", gpus=3)], "1", 4)
    assert not spread.gpus
    assert "".join(spread.nodes) == "1122"
