"""`make peers`: install the peers, prove that all are asked the same, measure, write the page.

`speed` measures rates in interleaved blocks; `curve NAME` trains one contender until a quality is
reached; `page` writes the page again. Each keeps what it measured in `reports/student_peers.json`.
"""

import argparse
import contextlib
import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

from core import data
from core.settings import DataSettings
from perf.peers import compare, page
from perf.peers.contenders import (
    CONTENDERS,
    LEFT_OUT,
    OWN,
    OWN_BF16,
    ROOT,
    Running,
    Unable,
    running,
)
from perf.peers.desk import Split

GOAL = 0.175
NOT_ASKED = "not asked for in this run (`--only`)"
STORE = ROOT / "reports/student_peers.json"
LEAST_QUALITY = 0.9
"""Share of the best full-softmax peer's validation ndcg@10 that the student must have after equal
steps, or no rate is reported."""


def main() -> None:
    options = arguments()
    split = options.home / "split"
    if options.do != "page" and not split.is_dir():
        options.home.mkdir(parents=True, exist_ok=True)
        data.save(data.prepare(DataSettings(source="ml-1m", root=str(options.data))), split)
    if options.do == "speed":
        speed(options, split)
    elif options.do == "curve":
        curve(options, split)
    measured = load()
    STORE.with_suffix(".md").write_text(page.render(measured, GOAL))
    if measured.get("curves"):
        page.draw(measured["curves"], GOAL, STORE.with_suffix(".svg"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.peers", description=__doc__)
    parser.add_argument("do", choices=["speed", "curve", "page"], nargs="?", default="speed")
    parser.add_argument("--data", type=Path, default=ROOT / "data/ml-1m", help="ratings.dat in it")
    parser.add_argument("--home", type=Path, default=ROOT / ".peers", help="interpreters and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of contenders; default: all")
    parser.add_argument("--steps", type=int, default=8, help="of one block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quality-steps",
        type=int,
        default=144,
        help="before the blocks; 0 leaves quality to the curves",
    )
    parser.add_argument("--every", type=int, default=3, help="curve: epochs between points")
    parser.add_argument("--most-cpu", type=float, default=20_000.0, help="curve: CPU seconds")
    parser.add_argument("--until", type=float, default=GOAL, help="curve: test ndcg@10")
    return parser.parse_args()


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Equality of data, size and quality first, then the blocks."""
    split, scratch = Split(folder), options.home / "top.npy"
    left_out = dict(LEFT_OUT)
    left_out |= {
        c.name: NOT_ASKED for c in CONTENDERS if options.only and c.name not in options.only
    }
    with contextlib.ExitStack() as open_ones:
        ready: dict[str, Running] = {}
        quality: dict[str, dict[str, float]] = {}
        chosen = {c.name: c for c in CONTENDERS if not options.only or c.name in options.only}
        for name, contender in chosen.items():
            try:
                found = open_ones.enter_context(
                    running(contender, options.home, folder, options.seed)
                )
                reference = ready.get(OWN.name, found).about
                why = compare.difference(found.about, reference)
                if not why:
                    say(f"{name}: {options.quality_steps} steps to compare quality")
                    found.train(options.quality_steps or 1)  # what cannot train is left out here
                    _, best = found.top(2, scratch)
                    why = compare.wrong_lists(best, split.histories(2), split.num_items)
            except Unable as unable:
                why = str(unable)
            if why:
                left_out[name] = why
                say(f"{name}: left out: {why}")
                continue
            ready[name], quality[name] = found, compare.quality(best, split.targets(2))
            say(f"{name}: {quality[name]}")
        full = [quality[n]["ndcg"] for n in ready if chosen[n].loss == OWN.loss]
        for own in {OWN.name, OWN_BF16.name} & set(ready):
            if options.quality_steps and quality[own]["ndcg"] < LEAST_QUALITY * max(full):
                raise SystemExit(f"{own} learns worse after equal steps: {quality}; no rates")
        found = compare.repeats(ready, split, options.steps, options.repeats, scratch)
        own = ready[OWN.name].about
        rows = {
            name: {
                **vars(figures),
                "quality": quality[name],
                "loss": chosen[name].loss,
                "note": chosen[name].note,
                "precision": chosen[name].precision,
                "version": ready[name].about["version"],
            }
            for name, figures in found.items()
        }
    users_with_rows = sum(len(row) >= 2 for row in split.histories(2))
    keep(
        speed={
            "own": {one.precision: one.name for one in (OWN, OWN_BF16) if one.name in ready},
            "contenders": rows,
            "left_out": left_out,
            "steps": options.steps,
            "quality_steps": options.quality_steps,
            "targets_per_sequence": own["targets"] / users_with_rows,
            "command": f"python -m perf.peers speed --steps {options.steps} --repeats "
            f"{options.repeats} --quality-steps {options.quality_steps} --seed {options.seed}"
            + (f" --only {shlex.join(options.only)}" if options.only else ""),
            "machine": machine(),
        }
    )


def curve(options: argparse.Namespace, folder: Path) -> None:
    """Train one contender until the goal is reached or its time is up; every point is kept."""
    (name,) = options.only
    contender = next(c for c in CONTENDERS if c.name == name)
    split, scratch = Split(folder), options.home / f"top-{contender.script}.npy"
    points: list[dict[str, Any]] = []
    seconds, steps = 0.0, 0
    with running(contender, options.home, folder, options.seed) as found:
        while seconds < options.most_cpu:
            trained = found.train(options.every * found.about["steps_per_epoch"])
            if not trained["steps"]:  # its schedule has ended
                break
            seconds, steps = seconds + trained["cpu_s"], steps + trained["steps"]
            point: dict[str, Any] = {"cpu_s": seconds, "steps": steps}
            for split_name, held_out in (("validation", 2), ("test", 1)):
                _, best = found.top(held_out, scratch)
                point[split_name] = compare.quality(best, split.targets(held_out))
            points.append(point)
            say(f"{name}: {point}")
            kept = load().get("curves", {})
            told = (found.about["version"], found.about.get("recipe"), contender.note)
            note = "; ".join(filter(None, told))
            kept[name] = {"points": points, "note": note, "machine": machine()}
            keep(curves=kept)
            if point["test"]["ndcg"] >= options.until:
                break


def load() -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(STORE.read_text()) if STORE.is_file() else {}


def keep(**measured: Any) -> None:
    """Add to what was measured."""
    partial = STORE.with_suffix(".partial")
    partial.write_text(json.dumps(load() | measured, indent=1) + "\n")
    partial.rename(STORE)


def machine() -> str:
    """The CPU's name and the instruction sets that decide these figures, system and torch."""
    text = Path("/proc/cpuinfo").read_text()
    name = text.partition("model name\t: ")[2].partition("\n")[0]
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{name} ({', '.join(wide)}), {platform.platform()}, torch {torch.__version__}"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
