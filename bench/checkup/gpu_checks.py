"""The doctor's checks of driver, allocator and the torch that runs."""

import re
from collections.abc import Mapping

from bench.checkup import rules
from bench.checkup.checks import Facts, Finding, broken, last_line, problem
from bench.checkup.fitness import (
    ALLOCATOR_VARIABLE,
    asks_expandable_segments,
    unread_allocator_variables,
)

LEAST_DRIVER = {"11": (450, 80, 2), "12": (525, 60, 13), "13": (580, 65, 6)}
"""Oldest Linux driver for each major CUDA."""


def torch_and_driver(facts: Facts) -> Finding:
    """The driver is new enough for the CUDA torch is built for."""
    name = "driver for torch's CUDA"
    if silent := broken(name, facts.torch):
        return silent
    version, cuda = facts.torch["version"], facts.torch["cuda"]
    if not facts.gpus:
        return Finding(name, "not applicable", f"torch {version}; no GPU is visible")
    if cuda is None:
        return Finding(
            name, "problem", f"torch {version} is built for the CPU, and a GPU is here",
            "install a CUDA build of torch: pip install --index-url "
            "https://download.pytorch.org/whl/cu126 torch",
        )  # fmt: skip
    driver = facts.gpus[0].get("driver")
    seen = f"torch {version} for CUDA {cuda}, driver {driver}"
    least = LEAST_DRIVER.get(cuda.partition(".")[0])
    if not isinstance(driver, str) or least is None:
        return Finding(name, "unknown", seen, "compare with the driver that nvidia-smi names")
    if not facts.torch["sees_gpu"]:
        wanted = ".".join(f"{part:02d}" for part in least)
        why = f"CUDA {cuda} needs driver {wanted} or newer; torch says: {last_line(facts.torch)}"
        return problem(name, f"{seen}; torch sees no GPU. {why}", "D1")
    if tuple(int(part) for part in re.findall(r"\d+", driver)) < least:
        seen += ", older than this CUDA needs: the image's compatibility libraries stand in"
    return Finding(name, "ok", seen)


def card(facts: Facts) -> Finding:
    """This torch has kernels for the GPU's generation."""
    name = "kernels for this GPU"
    if not facts.torch.get("sees_gpu"):
        return Finding(name, "not applicable", "torch sees no GPU")
    capability = ".".join(str(part) for part in facts.torch["capability"])
    seen = f"CUDA capability {capability}"
    if line := line_of("D8", facts.torch.get("log", "")):
        return problem(name, f"{seen}: {line}", "D8")
    return Finding(name, "ok", seen)


def virtual_memory(facts: Facts) -> Finding:
    """The driver maps virtual memory, which expandable segments need."""
    name = "virtual memory (attribute 102)"
    if not facts.gpus:
        return Finding(name, "not applicable", "no GPU is visible")
    if "unavailable" in facts.driver or not facts.driver.get("virtual_memory"):
        reason = facts.driver.get("unavailable", "the driver shows no device")
        return Finding(name, "unknown", str(reason), "do not set expandable_segments")
    supported = facts.driver["virtual_memory"][0]
    asked = asks_expandable_segments(allocator_options(facts))
    if not supported and asked:
        return problem(name, "0, and expandable_segments is set", "D1")
    if not supported:
        return Finding(name, "ok", "0: never set expandable_segments here; nothing asks for it")
    return Finding(name, "ok", f"1{', expandable_segments is set' if asked else ''}")


def allocator_names(facts: Facts) -> Finding:
    """Every allocator variable has a name that this torch reads."""
    name = "allocator variables"
    version = facts.torch.get("version") or facts.packages.get("torch")
    if problems := unread_allocator_variables(facts.variables, version):
        return problem(name, "; ".join(problems), "D2")
    return Finding(name, "ok", allocator_options(facts) or "none is set")


def allocator_settings(facts: Facts) -> Finding:
    """The allocator itself reports the options that were asked for."""
    name = "allocator's own settings"
    options = allocator_options(facts)
    if facts.allocator is None or not facts.torch.get("sees_gpu"):
        return Finding(name, "not applicable", "torch sees no GPU")
    if silent := broken(name, facts.allocator):
        return silent
    settings = facts.allocator["settings"]
    if isinstance(settings, str):
        settings = {ALLOCATOR_VARIABLE: settings}
    segments = settings.get("expandable_segments")
    if isinstance(segments, bool) and segments != asks_expandable_segments(options):
        return problem(name, f"asked {options or 'nothing'}, expandable_segments={segments}", "D2")
    seen = settings.get(ALLOCATOR_VARIABLE)
    if seen is not None and seen != options:
        return problem(name, f"asked {options or 'nothing'}, the allocator read {seen!r}", "D2")
    return Finding(name, "ok", options or "none asked, none in effect")


def image(facts: Facts) -> Finding:
    """Inside an image, the torch that runs is the image's."""
    name = "the image's torch"
    wanted = _image_cuda(facts.variables)
    if wanted is None and "PYTORCH_VERSION" not in facts.variables:
        return Finding(name, "not applicable", "not inside an image that names its CUDA")
    if "failed" in facts.torch:
        return Finding(name, "unknown", "torch does not answer")
    version, cuda, file = (facts.torch[key] for key in ("version", "cuda", "file"))
    problems = []
    if wanted and cuda != wanted:
        problems.append(f"the image has CUDA {wanted}, torch is built for {cuda}")
    pinned = facts.variables.get("PYTORCH_VERSION", "")
    if pinned and pinned != version.partition("+")[0]:
        problems.append(f"the image has torch {pinned}, {version} runs")
    if facts.base_torch and facts.base_torch != file:
        problems.append(f"{facts.base_torch} is hidden by {file}")
    if problems:
        return problem(name, "; ".join(problems), "D4")
    return Finding(name, "ok", f"{file}, CUDA {cuda}")


def _image_cuda(variables: Mapping[str, str]) -> str | None:
    """CUDA of the image, like 12.1, by NVIDIA's variable or by the name of our image."""
    if found := re.match(r"(\d+\.\d+)", variables.get("CUDA_VERSION", "")):
        return found[1]
    if found := re.search(r"\bcu(\d\d)(\d)\b", variables.get("ILORA_BENCH_IMAGE", "")):
        return f"{found[1]}.{found[2]}"
    return None


def line_of(rule: str, log: str) -> str | None:
    """The line of a log that a rule is recognised by."""
    found = [match.line for match in rules.matches(log) if match.rule.id == rule]
    return found[0] if found else None


def allocator_options(facts: Facts) -> str:
    """The allocator's options of this environment."""
    return facts.variables.get(ALLOCATOR_VARIABLE) or facts.variables.get("PYTORCH_ALLOC_CONF", "")
