"""`train.strategy: fsdp`: the frozen weights of a backbone's layers divided among the processes.

What is trained (adapters, router, projector, head) is small and stays whole in every process, as
under DDP, so optimizer, clipping and checkpoints need nothing gathered. torch's `fully_shard`
gathers the rest layer by layer, forward and backward.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, device: torch.device, size: int) -> list[nn.Module]:
    """Divide the frozen weights of the layers; the modules that gather them, outermost first."""
    from torch.distributed.fsdp import fully_shard  # older torch has it not

    outer, layers = next(
        (module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child)
    )
    mesh = init_device_mesh(device.type, (size,))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    others = set(outer.parameters()) - set(layers.parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # Holds nothing itself: under one roof the layers fetch each other's weights ahead.
    fully_shard(outer, mesh=mesh, ignored_params=trained | others)
    return [outer, *layers]


def make_whole(parts: list[nn.Module]) -> None:
    """Gather all weights for good, on every process; afterwards each can compute by itself."""
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def divided(model: nn.Module) -> dict[str, Any]:
    """Names of the divided weights, and bytes of the frozen ones here and in all."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    names = [name for name, parameter in frozen.items() if isinstance(parameter, DTensor)]
    here = sum(_bytes(frozen[n].to_local() if n in names else frozen[n]) for n in frozen)
    return {"names": names, "bytes": here, "whole_bytes": sum(map(_bytes, frozen.values()))}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
