"""The doctor's checks of the libraries around torch."""

from bench.checkup import rules
from bench.checkup.checks import Facts, Finding, broken, last_line, problem
from bench.checkup.fitness import torch_version
from bench.machine import LEAST_CAPABILITY


def transformers(facts: Facts) -> Finding:
    """transformers accepts this torch."""
    name = "transformers accepts torch"
    if silent := broken(name, facts.transformers):
        return silent
    version, torch = facts.transformers["version"], facts.packages.get("torch")
    if not facts.transformers["torch_available"]:
        observed = f"transformers {version} disables torch {torch}"
        return problem(name, f"{observed}: {last_line(facts.transformers)}", "D5")
    return Finding(name, "ok", f"transformers {version}, torch {torch}")


def safetensors(facts: Facts) -> Finding:
    """Which checkpoints may be loaded at all."""
    name = "weights that may be loaded"
    version = torch_version(facts.packages.get("torch"))
    if version is None:
        return Finding(name, "unknown", "no torch is installed")
    if version < (2, 6):
        return Finding(name, "ok", "safetensors only; .bin is refused before torch 2.6 (D6)")
    return Finding(name, "ok", "safetensors and .bin")


def bitsandbytes(facts: Facts) -> Finding:
    """bitsandbytes found a native library for the device that will be used."""
    name = "bitsandbytes' library"
    if silent := broken(name, facts.bitsandbytes):
        return silent
    answer = facts.bitsandbytes
    seen = f"bitsandbytes {answer['version']}, {answer['library']}"
    if override := facts.variables.get("BNB_CUDA_VERSION"):
        seen += f", BNB_CUDA_VERSION={override}"
    if answer["library"] is None or (answer["wants_cuda"] and not answer["compiled_with_cuda"]):
        return problem(name, f"{seen}: {last_line(answer)}", "D27")
    return Finding(name, "ok", seen)


def four_bit_on_cpu(facts: Facts) -> Finding:
    """4-bit layers keep their gradient on CPUs that repack them."""
    name = "4-bit training on the CPU"
    if "failed" in facts.bitsandbytes:
        return Finding(name, "unknown", "bitsandbytes did not answer")
    if facts.bitsandbytes["trains_on_cpu"] is None:
        return Finding(name, "not applicable", "4-bit layers run on the GPU here")
    if not facts.bitsandbytes["trains_on_cpu"]:
        return problem(name, "no gradient after an evaluation, the switch notwithstanding", "D17")
    if "avx512_bf16" in facts.cpu_flags:
        return Finding(name, "ok", "AVX512-BF16 CPU; the switch in core.llm keeps gradients")
    return Finding(name, "ok", "this CPU does not repack 4-bit weights")


WHEELS = (
    ("2.8.3", "cu12", (2, 4), (2, 8)),
    ("2.7.3", "cu11", (2, 1), (2, 5)),
)
"""flash-attn release, CUDA, first and last torch of its official wheels; newest that fits first."""


def flash_attn(facts: Facts) -> Finding:
    """flash-attn can be imported and has kernels for this card; else which wheel would."""
    name = "flash-attn"
    if "failed" in facts.torch:
        return Finding(name, "unknown", "torch does not answer")
    about = four_facts(facts)
    capability = facts.torch.get("capability")
    if not capability:
        return Finding(name, "not applicable", f"it has GPU kernels only ({about})")
    if tuple(capability) < LEAST_CAPABILITY:
        observed = f"CUDA capability {capability[0]}.{capability[1]} is below Ampere ({about})"
        if facts.flash_attn is None:
            return Finding(name, "not applicable", f"{observed}; sdpa runs here")
        return problem(name, observed, "D8")
    if facts.flash_attn is None:
        hub = (
            "; transformers would fetch a hub kernel instead" if "kernels" in facts.packages else ""
        )
        return Finding(name, "not applicable", f"not installed{hub} ({about}; {wheel(facts)})")
    if "failed" in facts.flash_attn:
        observed = f"{facts.flash_attn['failed']} ({about})"
        return Finding(
            name, "problem", observed, f"{rules.BY_ID['D7'].remedy}; {wheel(facts)}", "D7"
        )
    return Finding(name, "ok", f"{facts.flash_attn['version']} ({about})")


def four_facts(facts: Facts) -> str:
    """What the name of a flash-attn wheel must agree with."""
    major, minor = torch_version(facts.torch["version"]) or (0, 0)
    python = f"cp{facts.python[0]}{facts.python[1]}"
    abi = "TRUE" if facts.torch["cxx11_abi"] else "FALSE"
    return f"torch {major}.{minor}, CUDA {facts.torch['cuda']}, {python}, cxx11abi {abi}"


def wheel(facts: Facts) -> str:
    """The official flash-attn wheel for this interpreter, or that there is none."""
    version, cuda = torch_version(facts.torch["version"]), facts.torch["cuda"]
    tag = f"cu{(cuda or '').partition('.')[0]}"
    for release, wanted, first, last in WHEELS:
        if version and tag == wanted and first <= version <= last:
            python = f"cp{facts.python[0]}{facts.python[1]}"
            abi = "TRUE" if facts.torch["cxx11_abi"] else "FALSE"
            build = f"{tag}torch{version[0]}.{version[1]}cxx11abi{abi}"
            return (
                f"wheel: flash_attn-{release}+{build}-{python}-{python}-linux_x86_64.whl from "
                "github.com/Dao-AILab/flash-attention/releases"
            )
    return "no official wheel for this pair of torch and CUDA; sdpa holds the same kernels"


NEEDED = ("transformers", "peft", "bitsandbytes", "accelerate", "pytorch-lightning", "tokenizers",
          "safetensors", "sentencepiece", "pandas", "pyarrow")  # fmt: skip


def packages(facts: Facts) -> Finding:
    """The declared dependencies are installed."""
    name = "packages"
    missing = [package for package in NEEDED if package not in facts.packages]
    if missing:
        rule = "D21" if missing == ["sentencepiece"] else "D29"
        return problem(name, f"not installed: {', '.join(missing)}", rule)
    return Finding(name, "ok", f"all {len(NEEDED)} are installed")


def compiler(facts: Facts) -> Finding:
    """A compiler for what train.compile generates: C for the GPU, C++ for the CPU."""
    name = "compiler for train.compile"
    needed = "C" if facts.torch.get("sees_gpu") else "C++"
    path = facts.compilers.get(needed)
    if path is None:
        return problem(name, f"no {needed} compiler is found", "D18")
    return Finding(name, "ok", path)
