"""What is reached over the network: the store, and a Ray cluster."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from importlib.metadata import version

from etha_ray.doctor.check import Check, fail, ok, warn
from etha_ray.errors import EthaRayError
from etha_ray.kvstore import create_store
from etha_ray.net import no_listener

_STORE_TIMEOUT = 10.0
_RAY_TIMEOUT = 40.0

# In a process of its own: Ray ends a process that loses its cluster, and can only be connected once. RAY_AUTH_MODE and the rest of
# the environment are what they are here.
_ASK_RAY = """
import json, logging, sys
import ray
from ray.exceptions import AuthenticationError
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    said = {"state": "ok", "nodes": len(nodes), "gpus": ray.cluster_resources().get("GPU", 0),
            "address": ray.get_runtime_context().gcs_address}
except AuthenticationError as error:
    said = {"state": "token", "why": str(error)}
except ConnectionError as error:
    said = {"state": "none", "why": str(error)}
except Exception as error:
    said = {"state": "failed", "why": f"{type(error).__name__}: {error}"}
print(json.dumps(said), flush=True)
"""


def store(url: str, namespace: str) -> Check:
    """Whether a store takes a key and gives it back."""
    name = "store"
    began = time.monotonic()
    try:
        opened = create_store(url, namespace=namespace, timeout=_STORE_TIMEOUT)
        try:
            key, value = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(16)
            connected = time.monotonic()
            opened.set_bytes(key, value)
            right = opened.get_bytes(key) == value
            opened.delete(key)
            took = time.monotonic() - connected
        finally:
            opened.close(cleanup=False)
    except (EthaRayError, OSError, TimeoutError) as error:
        return fail(name, str(error), "start the store, or give its right URL; check firewalls, name, TLS files and password")
    if not right:
        return fail(name, "it gave back something else than was put", "another program writes there: give etha_ray a namespace of its own")
    found = f"a put, a get and a delete took {took * 1e3:.1f} ms ({connected - began:.2f} s to connect)"
    return (
        ok(name, found) if took < 1.0 else warn(name, found, "it is far away or overloaded: registering will be slow, transfers will not")
    )


class RayQuestion:
    """Asks a Ray cluster for its health while other checks go on."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._why = no_listener(address)
        self._process = None
        if not self._why:
            command = [sys.executable, "-c", _ASK_RAY, address]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def answer(self, needed: bool) -> Check:
        """What came of it. ``needed``: that there is no cluster is a failure, not a fact."""
        if self._process is None:
            return read_answer({"state": "none", "why": self._why}, self._address, needed)
        try:
            said, _ = self._process.communicate(timeout=_RAY_TIMEOUT)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            self._process.kill()
            self._process.wait()
        lines = said.strip().splitlines()
        try:
            answer = json.loads(lines[-1]) if lines else {}
        except json.JSONDecodeError:
            answer = {}
        return read_answer(answer, self._address, needed)


def read_answer(answer: dict[str, object], address: str, needed: bool) -> Check:
    """The line that an answer makes."""
    name, ray = "ray", f"Ray {version('ray')}"
    state = answer.get("state")
    if state == "ok":
        return ok(name, f"{ray}; the cluster at {answer['address']} answers: {answer['nodes']} nodes, {answer['gpus']:g} GPUs")
    if state == "token":
        remedy = "export RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN or ~/.ray/auth_token (ray get-auth-token)"
        return fail(name, f"{ray}; the cluster wants a token ({answer['why']})", remedy)
    if state == "none":
        if needed:
            return fail(name, f"{ray}; no cluster answers at {address!r} ({answer['why']})", "ray start --head, or give the right address")
        return ok(name, f"{ray}; no cluster runs here (etha-ray up needs one: ray start --head; torchrun does not)")
    why = answer.get("why", f"no answer in {_RAY_TIMEOUT:g} s")
    return fail(
        name, f"{ray}; a cluster is known at {address!r}, and does not serve ({why})", "ray stop, then ray start --head; or see ray status"
    )
