"""An agent that waits for relays, and for those that read from it, longer than a busy machine ever stands still.

So who passes on to whom depends on nothing but who takes part. Run as ``python -m tests.cluster.patient_agent``, like
`etha_ray.tensor_bus.agent`.
"""

from __future__ import annotations

from etha_ray.tensor_bus import relaying
from etha_ray.tensor_bus.agent import main
from tests.tensor_bus.cluster import LONG

if __name__ == "__main__":
    relaying._PATIENCE, relaying._LINGER = LONG, (LONG, LONG)
    main()
