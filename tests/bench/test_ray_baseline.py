"""Ray as a baseline leaves the benchmark in charge of its own process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_sigterm_still_unwinds_while_ray_runs() -> None:
    program = (
        "import time\n"
        "from etha_ray.bench.processes import leaving_on_sigterm\n"
        "from etha_ray.bench.ray_baseline import open_ray\n"
        "with leaving_on_sigterm(), open_ray(1):\n"
        "    try:\n"
        "        print('up', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('unwound', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "unwound\n"
    assert process.returncode == 128 + signal.SIGTERM
