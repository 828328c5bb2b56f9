"""What part of a global tensor each rank of a group holds.

A `Layout` is a mesh shape with one placement per mesh dimension. `Layout.region` answers which indices of the global
tensor a rank holds, by DTensor's own rule: mesh dimensions that shard the same tensor dimension nest left to right, each
cutting what the ones before it left, by `torch.chunk` (sizes rounded up, the last shards smaller or empty). `Pieces` is the
same for shards that no placement describes: each rank says its box. Everything here is pure and immutable: the same input
gives the same answer in every process, without communication, and any thread may call it.

A placement is a token inside etha_ray, ``"S0"`` for ``Shard(0)``; `tokens` has the table. A mesh position is its row-major
index in the mesh, from 0; it is not the agent's rank, nor the rank in a process group.
"""

from __future__ import annotations

from etha_ray.layout.layout import Layout, Reduction
from etha_ray.layout.mesh import MeshSpec
from etha_ray.layout.pieces import Piece, Pieces
from etha_ray.layout.region import Axis, Intervals, Region
from etha_ray.layout.tokens import CombineOp, placement_tokens

__all__ = [
    "Axis",
    "CombineOp",
    "Intervals",
    "Layout",
    "MeshSpec",
    "Piece",
    "Pieces",
    "Reduction",
    "Region",
    "placement_tokens",
]
