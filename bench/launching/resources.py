"""What the nodes of a Ray cluster have, what cells take of it, and the lanes that makes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.settings import Settings


@dataclass(frozen=True)
class Offer:
    """A lane to ask Ray for."""

    name: str
    options: dict[str, Any]


def nodes() -> list[dict[str, Any]]:
    """Nodes that are there and have something to compute with, in a fixed order."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"] and (cpus_of(node) or gpus_of(node))]
    return sorted(found, key=lambda node: (node["NodeManagerHostname"], node["NodeID"]))


def cpus_of(node: dict[str, Any]) -> int:
    """Cores a node lends to tasks."""
    return int(node["Resources"].get("CPU", 0))


def gpus_of(node: dict[str, Any]) -> int:
    """GPUs of a node."""
    return int(node["Resources"].get("GPU", 0))


def gpus_needed(settings: Settings) -> int:
    """GPUs a cell takes; `auto` takes what the cluster's largest node has, if any has one."""
    most = max(map(gpus_of, nodes()), default=0)
    device, wanted = settings.machine.device, settings.train.devices
    if device == "cpu" or (device == "auto" and not most):
        return 0
    return max(1, most) if wanted == "auto" else wanted


def offered(need: int, on_cpu: bool) -> Iterator[Offer]:
    """The lanes the nodes have for cells that take up to `need` GPUs.

    Where any cell computes on the CPU a node is one lane; else each group of GPUs is one, with its
    share of the cores. All cores of a lane are asked for: so no other task of Ray runs beside it.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    for node in nodes():
        if gpus_of(node) < need or not (need or cpus_of(node)):
            continue
        lanes = 1 if on_cpu else gpus_of(node) // need
        for number in range(lanes):
            place = f"{node['NodeManagerHostname']}-{node['NodeID'][:8]}"
            yield Offer(
                place if lanes == 1 else f"{place}/{number}",
                {
                    "num_gpus": gpus_of(node) if on_cpu and need else need,
                    "num_cpus": cpus_of(node) // lanes,
                    "max_concurrency": 2,
                    "max_restarts": 0,
                    "scheduling_strategy": OnNode(node["NodeID"], soft=False),
                },
            )
