"""What part of a piece of work is matrix products and attention, and so what is left to gain."""

from torch.profiler import ProfilerActivity, profile

from perf.timing import Paired, Work

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
COUNTED = {f"aten::{name}" for name in (*PRODUCTS, ATTENTION, f"{ATTENTION}_backward")}


def share(work: Work) -> float:
    """Of the time inside torch's operators, that of products and attention. What Python spends
    between operators is left out, so the true share is smaller.
    """
    work()  # the first time builds and allocates
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    own = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(own.get(name, 0.0) for name in COUNTED) / sum(own.values())


def most(ratio: Paired, work: Work) -> str:
    """What the ratio would be if nothing but the products of the own side took time, in words."""
    part = share(work)
    return f"{part:.0%} products and attention: {ratio.median / part:.2f} if nothing else were left"
