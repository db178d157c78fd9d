"""What part of a piece of work is matrix products and attention, and so what is left to gain."""

import torch
from torch.profiler import ProfilerActivity, profile

from perf.timing import Paired, Work

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_scaled_dot_product_cudnn_attention",
)
BACKWARD = tuple(name.replace("_forward", "") + "_backward" for name in ATTENTION)
COUNTED = {f"aten::{name}" for name in (*PRODUCTS, *ATTENTION, *BACKWARD)}


def share(work: Work, device: str = "cpu") -> float:
    """Of the time inside torch's operators, on a GPU of their kernels, that of products and
    attention. What Python spends between operators is left out, so the true share is smaller.
    """
    activities, clock = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device != "cpu":
        activities, clock = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    work()  # the first time builds and allocates
    with profile(activities=activities) as seen:
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
    # A kernel is an event too, beside the operator that launched it.
    own = {
        event.key: getattr(event, clock)
        for event in seen.key_averages()
        if device == "cpu" or event.key.startswith("aten::")
    }
    return sum(own.get(name, 0.0) for name in COUNTED) / sum(own.values())


def most(ratio: Paired, work: Work, device: str = "cpu") -> str:
    """What the ratio would be if nothing but the products of the own side took time, in words."""
    part = share(work, device)
    return f"{part:.0%} products and attention: {ratio.median / part:.2f} if nothing else were left"
