"""The README's cluster section as written: `ray up` over ssh, the main job, its report fetched, `ray down`.

On a host of its own, for `ray up` and `ray down` end every Ray of the machine, and because of ports, homes and keys.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import blocks

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parents[1]
MARK = "<!-- executed by tests/cluster/test_ray_up.py -->\n"
IN_CI = "ETHA_RAY_TEST_ETCD" in os.environ  # .ci/run sets it, and installs what is needed
INSTALL = "apt-get install openssh-server openssh-client rsync"
THE_END = "----- what is there afterwards -----"
AFTERWARDS = f"""
echo '{THE_END}'
ps -eo args
find /dev/shm /tmp/etha_ray_0 -type f
echo '{THE_END}'
cat reports/weight_sync.html
"""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.slow,
    pytest.mark.skipif(
        any(path.is_relative_to("/tmp") for path in (ROOT, VENV)), reason="the host has a /tmp of its own, and this is in /tmp"
    ),
]


@pytest.fixture(autouse=True)
def _can_be_done() -> None:
    """Skips where the host cannot be made, or lacks ssh; in CI, where it is installed, that fails."""
    missing = [
        name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing and IN_CI:
        pytest.fail(f"{', '.join(missing)} not found: {INSTALL}")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: {INSTALL}")
    refused = subprocess.run([ROOT / ".ci/isolated", "true"], env=_environment(), capture_output=True, text=True, timeout=60, check=False)
    if refused.returncode:
        pytest.skip(f"hosts of their own cannot be made here: {refused.stderr.strip()}")


def _environment() -> dict[str, str]:
    """Without a Ray, and without the etcd that a host would get."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "ETHA_RAY_"))}


def test_the_readme_s_commands_bring_a_cluster_up_run_the_job_and_end_it() -> None:
    ((language, commands),) = blocks(MARK)
    assert language == "bash"
    ended = subprocess.run(
        [
            ROOT / ".ci/isolated",
            "bash",
            ROOT / "tests/cluster/sshd_host.sh",
            ROOT,
            VENV,
            "bash",
            "-euo",
            "pipefail",
            "-c",
            commands + AFTERWARDS,
        ],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    printed, afterwards, report = ended.stdout.split(THE_END + "\n")
    assert len(re.findall(r"^Version \d: .*, bit-exact$", printed, re.MULTILINE)) == 2, printed
    assert "succeeded" in printed
    assert not re.search("raylet|gcs_server|ray::|weight-sync", afterwards), afterwards
    assert report.startswith("<!DOCTYPE html>")
    assert report.count('class="good">yes<') == 2
