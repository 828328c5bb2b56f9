"""The cluster files are what Ray's own validator accepts, and say what the machines that they name need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster_configs"
LAUNCHED = ["aws", "gcp", "local"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.fixture
def resource() -> dict[str, Any]:
    return load("kuberay")


def started_with(config: dict[str, Any]) -> dict[str, str]:
    """The variables that a worker node's Ray, and so agents and workers, are started with."""
    command = config["worker_start_ray_commands"][-1]
    exported = re.search(r"export (.*?);\s+(?:ulimit|ray)", command)
    assert exported is not None
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', exported[1])}


def test_all_are_tested() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted([*LAUNCHED, "kuberay"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)  # files to mount are named from there
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_token_travels_and_other_mounted_files_exist(name: str) -> None:
    mounts = load(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / local).exists() for local in mounts.values())


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_may_open_many_files_and_the_object_store_leaves_shared_memory_to_tensors(name: str) -> None:
    config = load(name)
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][-1]
        assert "--object-store-memory=" in start
        in_containers = "--ulimit nofile=65536:65536" in config.get("docker", {}).get("run_options", [])
        assert in_containers or "ulimit -n 65536" in start


def test_aws_gives_each_p5_all_its_efa_cards() -> None:
    config = load("aws")
    node = config["available_node_types"]["p5"]["node_config"]
    cards = node["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 31
    assert {card["InterfaceType"] for card in cards} == {"efa", "efa-only"}
    # Ray refuses cards without these, and a node that has them beside its cards.
    assert all(card["SubnetId"].startswith("subnet-") and card["Groups"] for card in cards)
    assert not {"SubnetId", "SubnetIds", "SecurityGroupIds"} & node.keys()
    assert node["Placement"]["GroupName"]
    variables = started_with(config)
    assert variables["FI_PROVIDER"] == "efa"
    assert "/opt/amazon/ofi-nccl/lib" in variables["LD_LIBRARY_PATH"].split(":")
    assert {"NCCL_SOCKET_IFNAME", "FI_EFA_USE_HUGE_PAGE"} <= variables.keys()
    assert "ulimit -l unlimited" in config["worker_start_ray_commands"][-1]


def test_gcp_binds_tcpx_to_the_cards_that_the_node_has() -> None:
    config = load("gcp")
    cards = config["available_node_types"]["a3"]["node_config"]["networkInterfaces"]
    assert len({card["subnetwork"] for card in cards}) == 5, "each card is in a network of its own"
    assert {card["nicType"] for card in cards} == {"GVNIC"}
    variables = started_with(config)
    assert variables["NCCL_SOCKET_IFNAME"] == variables["NCCL_GPUDIRECTTCPX_CTRL_DEV"] == "eth0"
    data = [f"eth{number}" for number in range(1, len(cards))]
    assert variables["NCCL_GPUDIRECTTCPX_SOCKET_IFNAME"].split(",") == data
    for way in ("TX", "RX"):
        bindings = variables[f"NCCL_GPUDIRECTTCPX_{way}_BINDINGS"].split(";")
        assert [binding.split(":")[0] for binding in bindings] == data
    helper = variables["NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX"]
    assert any(f"-v {helper}:{helper}" in option for option in config["docker"]["worker_run_options"])
    assert any(f"--uds_path {helper}" in command for command in config["available_node_types"]["a3"]["initialization_commands"])
    for role in ("head", "worker"):
        assert any(option.startswith("--shm-size=") for option in config["docker"][f"{role}_run_options"])


def test_ray_derives_an_autoscaling_config_from_the_kuberay_resource(resource: dict[str, Any]) -> None:
    """What Ray's autoscaler does in the head's pod, which validates the result."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", "RayCluster")
    config = _derive_autoscaling_config_from_ray_cr(resource)
    nodes = config["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    assert nodes["gpus"]["resources"]["GPU"] == 8
    assert (nodes["gpus"]["min_workers"], nodes["gpus"]["max_workers"]) == (0, 2)
    assert config["idle_timeout_minutes"] == 15


def test_every_pod_has_shared_memory_that_fits_it(resource: dict[str, Any]) -> None:
    spec = resource["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        shared, limit = (
            int(size.removesuffix("Gi")) for size in (volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert int(group["rayStartParams"]["object-store-memory"]) < shared * 2**30 / 2
        assert shared < limit, "what is in shared memory counts against the container's limit"
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_pods_with_gpus_say_where_nccl_ranks_meet(resource: dict[str, Any]) -> None:
    (group,) = resource["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {variable["name"]: variable["value"] for variable in container["env"]} == {"NCCL_SOCKET_IFNAME": "eth0"}


def test_the_kuberay_resource_runs_the_ray_of_the_constraints(resource: dict[str, Any]) -> None:
    pinned = re.search(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert resource["spec"]["rayVersion"] == pinned[1]
