"""The page and the plot of the comparison, made from what was measured and nothing else."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

from bench.reporting.tables import plain, table
from perf.peers.compare import ratio, seconds_to

HEAD = """\
# The student beside other SASRec implementations

Written by `make peers`; do not edit. MovieLens-1M, leave-one-out by a stable sort (ties in time
keep the order of the file), newest 200 items, full ranking, seen items removed. All train on the
same rows, two blocks of width 64, one head, dropout 0.1, batches of 128 rows (this student: of as
many tokens as 128 rows have on average), Adam at 1e-3 or what the curve's line says. The
student is set beside each peer in the peer's precision. One thread
each; the clock is the process's CPU time, measured inside it around training steps and around
ranking all users down to a top 10 list. Blocks run in turn, in alternating order; the first of each
is not counted. *Stock* runs as documented; *tuned* with the options its project ships for speed and
an allocator that keeps freed memory (`MALLOC_MMAP_MAX_=0` and the like), as this student does. The
code is in `tests/perf/peers`.
"""


def render(measured: dict[str, Any], goal: float) -> str:
    """Markdown of everything measured."""
    parts = [HEAD]
    if "speed" in measured:
        parts += [_speed(measured["speed"])]
    if measured.get("curves"):
        parts += ["## Time to quality", _curves(measured["curves"], goal)]
        parts += ["![test ndcg@10 against CPU seconds of training](student_peers.svg)"]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _speed(speed: dict[str, Any]) -> str:
    rows = []
    for name, found in speed["contenders"].items():
        own = speed["contenders"][speed["own"][found["precision"]]]
        figures = [_spread(found["train"], speed["targets_per_sequence"]), _spread(found["ranked"])]
        ratios = ["", ""]
        if found is not own:
            ratios = [_times(ratio(own[key], found[key])) for key in ("train", "ranked")]
        quality = found["quality"]
        learnt = f"{quality['recall']:.4f} / {quality['ndcg']:.4f}"
        rows.append(
            [
                plain(name),
                plain(found["loss"]),
                figures[0],
                ratios[0],
                figures[1],
                ratios[1],
                f"{found['peak_rss_mib']:.0f}",
                *([learnt] if speed["quality_steps"] else []),
                plain(", ".join(filter(None, (found["version"], found["note"])))),
            ]
        )
    head = ["", "loss", "train seq/s", "own is", "rank users/s", "own is", "peak MiB"]
    head += [f"after {speed['quality_steps']} steps"] if speed["quality_steps"] else []
    head += ["what"]
    left_out = [[plain(name), plain(why)] for name, why in speed["left_out"].items()]
    count = len(own["train"])
    said = (
        "Quality: recall@10 / ndcg@10 of the validation items after as many steps for each."
        if speed["quality_steps"]
        else "Quality was not compared in this run, only in the curves."
    )
    text = f"""## Speed

Median (least to most) of {count} repeats of {speed["steps"]} steps and one ranking of all users.
Real targets are counted, since rows differ in length; a sequence has
{speed["targets_per_sequence"]:.1f} on average. *own is*: median (least to most) of the {count}
paired ratios. {said}
Command: `{speed["command"]}`. {speed["machine"]}.
"""
    return "\n\n".join(
        [text.strip(), table(head, rows), "Not in the table:", table(["", "why"], left_out)]
    )


def _curves(curves: dict[str, Any], goal: float) -> str:
    rows = []
    for name, curve in curves.items():
        points = curve["points"]
        best = max(points, key=lambda p: p["validation"]["ndcg"])
        reached = seconds_to(points, goal)
        last = points[-1]
        rows.append(
            [
                plain(name),
                f"{reached:.0f} s" if reached else f"not within {last['cpu_s']:.0f} s",
                f"{last['steps']}",
                f"{best['cpu_s']:.0f} s",
                f"{best['validation']['recall']:.4f} / {best['validation']['ndcg']:.4f}",
                f"{best['test']['recall']:.4f} / {best['test']['ndcg']:.4f}",
                plain(f"{curve['note']}; {curve['machine'].partition(' (')[0]}"),
            ]
        )
    head = ["", f"CPU time to test ndcg@10 {goal}", "steps run", "best validation at"]
    return table([*head, "validation there", "test there", "how"], rows)


def _spread(values: list[float], divisor: float = 1.0) -> str:
    scaled = [value / divisor for value in values]
    return f"{statistics.median(scaled):,.0f} ({min(scaled):,.0f} to {max(scaled):,.0f})"


def _times(found: tuple[float, float, float]) -> str:
    return "{:.2f}× ({:.2f} to {:.2f})".format(*found)


def draw(curves: dict[str, Any], goal: float, path: Path) -> None:
    """Test ndcg@10 against CPU seconds of training, as SVG."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, curve in curves.items():
        seconds = [point["cpu_s"] for point in curve["points"]]
        axes.plot(seconds, [p["test"]["ndcg"] for p in curve["points"]], marker=".", label=name)
    axes.axhline(goal, color="grey", linestyle=":", label=f"goal {goal}")
    axes.set(xlabel="CPU seconds of training, one thread", ylabel="test ndcg@10", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
