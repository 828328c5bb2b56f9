"""Which part of a tensor goes from whom to whom, between any two layouts.

A rank asks only for its own part: `routes_into` lists what a target receives, `routes_out_of` what a source gives. Both
work dimension by dimension on intervals: a target's region is looked up in the pieces that the source's axes are cut into,
so the cost follows what that rank exchanges, and no rank ever lists the product of two groups. Where several sources hold
the same, `sharing` says who gives what, and where several targets want the same, `relays` who passes it on; where the source
is Partial, a route names every contributor. Everything is frozen data and pure functions: the same on every rank, without
communication, in any thread. `plan` collects all routes, to prove (`TensorPlan.verify`), hash or show them.

Positions are indices in a side's mesh (see `etha_ray.layout`), not agent ranks; `Side` says which agent sits at each.
"""

from __future__ import annotations

from etha_ray.plan.digest import digest_inputs
from etha_ray.plan.proof import prove_target
from etha_ray.plan.relays import passed_on
from etha_ray.plan.route import Box, Route, paired_route
from etha_ray.plan.routing import check_sides, check_target, routes_into, routes_out_of
from etha_ray.plan.sharing import turns
from etha_ray.plan.side import Side
from etha_ray.plan.whole import TensorPlan, inputs_digest, plan

__all__ = [
    "Box",
    "Route",
    "Side",
    "TensorPlan",
    "check_sides",
    "check_target",
    "digest_inputs",
    "inputs_digest",
    "paired_route",
    "passed_on",
    "plan",
    "prove_target",
    "routes_into",
    "routes_out_of",
    "turns",
]
