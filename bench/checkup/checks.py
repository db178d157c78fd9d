"""Facts of a machine and what a check makes of them; checks of what surrounds the measuring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.checkup import rules
from bench.checkup.fitness import distorting, gib
from bench.checkup.probes import ISOLATION, Answer
from bench.machine import LEAST_DISK_BYTES, LEAST_MEMORY_BYTES

Status = Literal["problem", "unknown", "ok", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    status: Status
    observed: str
    remedy: str = ""
    rule: str | None = None
    """Id of the rule of `bench.checkup.rules` that explains a problem."""


@dataclass(frozen=True)
class Facts:
    """Everything the checks look at; plain data, so that it can be recorded and made up."""

    variables: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distribution name -> installed version."""
    gpus: Sequence[Mapping[str, Any]] = ()
    """As `bench.metering.gpus.gpus` tells them."""
    driver: Mapping[str, Any] = field(default_factory=dict)
    """As `bench.metering.gpus.driver` tells it."""
    busy: Sequence[str] = ()
    torch: Answer = field(default_factory=dict)
    transformers: Answer = field(default_factory=dict)
    bitsandbytes: Answer = field(default_factory=dict)
    flash_attn: Answer | None = None
    allocator: Answer | None = None
    isolation: Mapping[str, Answer] = field(default_factory=dict)
    """Answers of `bench.checkup.probes`; None or missing = not asked."""
    python: tuple[int, int] = (3, 11)
    base_torch: str | None = None
    """Where the interpreter below a virtual environment finds torch."""
    compilers: Mapping[str, str | None] = field(default_factory=dict)
    cpu_flags: frozenset[str] = frozenset()
    engine: str | None = None
    """A container engine that answers."""
    no_engine: str = "no container engine"
    """Why none does."""
    toolkit: bool = False
    """Whether that engine can hand a GPU to a container."""
    hub_token: bool = False
    shared_memory_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    cores: int = 1
    load: float = 0.0


def problem(name: str, observed: str, rule: str) -> Finding:
    """A problem that one of the rules explains and cures."""
    return Finding(name, "problem", observed, rules.BY_ID[rule].remedy, rule)


def broken(name: str, answer: Answer) -> Finding | None:
    """The finding for a probe that gave no answer, explained by its last words if known."""
    if "failed" not in answer:
        return None
    known = rules.matching(f"{answer.get('log', '')}\n{answer['failed']}")
    if known:
        return problem(name, answer["failed"], known[0].id)
    return Finding(name, "problem", answer["failed"], "run the same import by hand and read it")


def last_line(answer: Answer) -> str:
    """The last thing a probe printed beside its answer."""
    lines = [line.strip() for line in answer.get("log", "").splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


# ---- what surrounds the measuring ----


def card_in_use(facts: Facts) -> Finding:
    """Nobody else computes on the GPU."""
    name = "the GPU is free"
    if not facts.gpus:
        return Finding(name, "not applicable", "no GPU is visible")
    if hidden := facts.gpus[0].get("nvml"):
        return Finding(name, "unknown", f"NVML is hidden: {hidden}", "ask whoever runs the host")
    if facts.busy:
        return Finding(name, "problem", "; ".join(facts.busy), "nvidia-smi shows who it is")
    return Finding(name, "ok", "no processes, memory or work of others that NVML shows")


def distorting_variables(facts: Facts) -> Finding:
    """No variable is set under which timings mean nothing."""
    name = "distorting variables"
    if problems := distorting(facts.variables):
        return Finding(name, "problem", "; ".join(problems), "unset them")
    return Finding(name, "ok", "none is set")


def containers(facts: Facts) -> Finding:
    """An engine for machine.image, and the GPU inside its containers."""
    name = "containers"
    if facts.engine is None:
        return Finding(name, "not applicable", f"{facts.no_engine}; machine.image: host runs")
    if facts.gpus and not facts.toolkit:
        return problem(name, f"{facts.engine} answers, but cannot hand over the GPU", "D19")
    return Finding(name, "ok", f"{facts.engine} answers")


def hub(facts: Facts) -> Finding:
    """What may be fetched from the model hub."""
    name = "model hub"
    if offline := [
        variable
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if facts.variables.get(variable, "0").upper() in ("1", "TRUE", "ON", "YES")
    ]:
        return Finding(name, "ok", f"offline ({offline[0]}): presets and what is cached (D20)")
    if facts.hub_token:
        return Finding(name, "ok", "a token is stored")
    return Finding(name, "ok", "no token: presets, local folders and public models only (D20)")


LEAST_SHARED_BYTES = 256 << 20


def shared_memory(facts: Facts) -> Finding:
    """Room for the batches of loader workers."""
    name = "shared memory for loader workers"
    seen = f"/dev/shm has {facts.shared_memory_bytes >> 20} MiB"
    if facts.shared_memory_bytes < LEAST_SHARED_BYTES:
        return problem(name, seen, "D16")
    return Finding(name, "ok", seen)


def room(facts: Facts) -> Finding:
    """Disk and memory for a run."""
    name = "disk and memory"
    seen = f"{gib(facts.disk_bytes)} of disk, {gib(facts.memory_bytes)} of memory free"
    if facts.disk_bytes < LEAST_DISK_BYTES or facts.memory_bytes < LEAST_MEMORY_BYTES:
        return Finding(name, "problem", seen, "free at least 1 GiB of each")
    return Finding(name, "ok", seen)


def load(facts: Facts) -> Finding:
    """Cores that nobody else uses."""
    name = "idle cores"
    seen = f"load {facts.load:.1f} on {facts.cores} cores"
    if facts.load > 0.5 * facts.cores:
        return Finding(name, "problem", seen, "stop other work: timings share the cores with it")
    return Finding(name, "ok", seen)


def isolation_step(facts: Facts, step: str) -> Finding:
    """One step of the hunt for the part at fault; later steps contain the earlier ones."""
    name = f"alone: {step.replace('_', ' ')}"
    answer = facts.isolation[step]
    before = ISOLATION[: ISOLATION.index(step)]
    if first := next((one for one in before if "failed" in facts.isolation.get(one, {})), None):
        return Finding(name, "unknown", f"it contains '{first}', which already fails")
    return broken(name, answer) or Finding(name, "ok", f"runs on {answer['device']}")
