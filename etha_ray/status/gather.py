"""Where the agents of a pool are looked for: in their files on this host, and through Ray on others."""

from __future__ import annotations

from etha_ray.tensor_bus.inspection import SeenAgent, agents_here


def gather(namespace: str, address: str | None = None) -> list[SeenAgent]:
    """The agents of a pool, by rank.

    Args:
        namespace: the pool.
        address: of the Ray cluster on whose other nodes agents are looked for, too; None looks at this host only, and needs no Ray.

    Raises:
        AgentNotFoundError: (a ConnectionError) no Ray cluster answers at ``address``.
    """
    found = {agent.rank: agent for agent in agents_here(namespace)}
    if address is not None:
        from etha_ray.runtime import connect, seen_agents

        connect(address)
        for agent in seen_agents(namespace):
            # This host's own look is the better one: it tells a stuck agent from one that was killed.
            if agent.rank not in found or (found[agent.rank].life == "dead" and agent.life != "unreachable"):
                found[agent.rank] = agent
    return [found[rank] for rank in sorted(found)]
