"""What can be looked at of a plan: `explain` and what it returns.

`numbers` counts; `text` says it in words, `shard_map` and `byte_map` draw it as a `picture`, which `svg` and `png` write.
"""

from etha_ray.explanation.explanation import Explanation, explain
from etha_ray.explanation.numbers import PlanNumbers

__all__ = ["Explanation", "PlanNumbers", "explain"]
