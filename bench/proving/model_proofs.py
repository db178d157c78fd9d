"""Proofs of the settings that act inside the model: arithmetic, layers, attention, graphs."""

import re
from collections.abc import Mapping, Sequence

from bench.proving.proved import (
    Facts,
    Proved,
    Settings,
    counted,
    mebibytes,
    missing,
    several,
    together,
    unknown,
)

PRODUCT_DTYPES = {
    "fp32": "float32",
    "tf32": "float32",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "fp16-mixed": "float16",
    "fp16-true": "float16",
}
FLOAT8 = "float8_e4m3fn"
"""Of both factors of a forward product; gradients have another range of exponents."""
# Rotary position angles are multiplied in float32 on purpose, once for each forward of the backbone
# (recomputation may repeat it); every other product must run in the dtype that was asked for.
FLOAT32_EXCEPTIONS = 2
# 4-bit weights are stored as packed bytes: their dtype says nothing about the precision that runs.
PACKED = "uint8"
# float32 operands on tensor cores are TF32. cuBLAS and CUTLASS say it (`…_tf32f32_…`) or name the
# instruction (`s1688gemm`, which with another operand type carries that type's name).
TF32_KERNELS = re.compile(r"tf32|(?<![a-z0-9])s1688gemm(?!_(?:bf|f|fp)16)", re.IGNORECASE)
# cuBLAS's newest family bears no operand type; it has tensor-core kernels alone.
UNNAMED_TENSOR_KERNELS = "nvjet"
FLOAT32_KERNELS = re.compile(r"sgemm|simt|f32f32_f32f32", re.IGNORECASE)


def prove_precision(value: str, facts: Facts, settings: Settings) -> Proved:
    """Operand dtypes of the backbone's products; all else that bears a dtype must agree."""
    if value == "fp8":
        return prove_float8(facts)
    dtype, mixed = PRODUCT_DTYPES[value], value.endswith("-mixed")
    requested = f"{dtype} products" + (" under autocast" if mixed else ", autocast off")
    if dtype == "float32":
        requested += f", TF32 {'on' if value == 'tf32' else 'off'}"
    products = {name: n for name, n in (facts.get("gemm_dtypes") or {}).items() if n}
    if not products:
        return unknown(requested, "matrix products of the backbone")
    parameters = facts.get("param_dtypes") or {}
    trainable, frozen = parameters.get("trainable") or {}, parameters.get("frozen") or {}
    autocast = autocast_of(facts, products, trainable)
    holds = [
        products_agree(products, dtype),
        autocast_agrees(autocast, dtype, mixed),
        set(trainable) <= {"float32"} if mixed else set(frozen) <= {dtype, PACKED},
        packed_agree(facts, dtype),
    ]
    observed = f"{counted(products)} products, autocast {autocast}"
    for kind, dtypes in (("trainable", trainable), ("frozen", frozen)):
        observed += f", {kind} {counted(dtypes)}" if dtypes else ""
    if facts.get("quant"):
        observed += f", 4-bit layers compute in {facts['quant'].get('compute_dtype')}"
    if dtype == "float32":
        agrees, seen = prove_tf32(value == "tf32", facts)
        holds.append(agrees)
        observed += f", {seen}"
    return Proved(together(holds), requested, observed)


def prove_float8(facts: Facts) -> Proved:
    """A float8 product for each linear layer that was converted, as many layers as are adapted at
    least, and all else as under bf16-mixed.
    """
    requested = "float8 products in all frozen linear layers, bfloat16 products under autocast"
    products = {name: n for name, n in (facts.get("gemm_dtypes") or {}).items() if n}
    if not products:
        return unknown(requested, "matrix products of the backbone")
    if name := missing(facts, "layers_float8", "layers_adapted"):
        return unknown(requested, name)
    layers, adapted = facts["layers_float8"], facts["layers_adapted"]
    others = {name: n for name, n in products.items() if name != FLOAT8}
    trainable = (facts.get("param_dtypes") or {}).get("trainable") or {}
    autocast = autocast_of(facts, others, trainable) if others else "unknown"
    holds = [
        layers >= max(adapted, 1) and products.get(FLOAT8, 0) == layers,
        products_agree(others, "bfloat16"),
        autocast_agrees(autocast, "bfloat16", mixed=True),
        set(trainable) <= {"float32"},
    ]
    observed = (
        f"{counted(products)} products of {several(layers, 'float8 layer')}, {adapted} layers"
    )
    return Proved(together(holds), requested, f"{observed} adapted, autocast {autocast}")


def products_agree(products: Mapping[str, int], dtype: str) -> bool:
    """Whether all products ran in the dtype, bar the few that 16-bit models keep in float32."""
    others = {name: n for name, n in products.items() if name != dtype}
    allowed = 0 if dtype == "float32" else FLOAT32_EXCEPTIONS
    strays = sum(others.values())
    return set(others) <= {"float32"} and strays <= allowed and products.get(dtype, 0) > strays


def autocast_agrees(autocast: str, dtype: str, mixed: bool) -> bool | None:
    """16-bit products alone do not tell autocast from 16-bit weights; float32 ones show it off."""
    if autocast == "unknown":
        return True if dtype == "float32" else None
    return autocast == (dtype if mixed else "off")


def autocast_of(facts: Facts, products: Mapping[str, int], trainable: Mapping[str, int]) -> str:
    """The autocast dtype of the observed step, "off", or "unknown".

    Where it was not read, 16-bit products of adapters whose weights are all float32 give it away.
    """
    if "autocast_dtype" in facts:
        return facts["autocast_dtype"] or "off"
    if not trainable:
        return "unknown"
    running = max(products, key=lambda name: products[name])
    return running if set(trainable) == {"float32"} and running != "float32" else "off"


def packed_agree(facts: Facts, dtype: str) -> bool | None:
    """4-bit layers unpack to a dtype of their own, which must be that of the other products."""
    if not facts.get("layers_4bit"):
        return True
    if missing(facts, "quant"):
        return None
    return bool(facts["quant"].get("compute_dtype") == dtype)


def prove_tf32(wanted: bool, facts: Facts) -> tuple[bool | None, str]:
    """torch's one switch read back, and on CUDA the names of the kernels that ran."""
    if missing(facts, "float32_matmul_precision"):
        return None, "float32_matmul_precision not observed"
    switch = facts["float32_matmul_precision"]
    kernels = facts.get("gpu_kernels")
    seen = f"float32_matmul_precision {switch}"
    holds = [switch == ("high" if wanted else "highest")]
    if kernels:
        found = tf32_in(kernels, wanted)
        holds.append(found if wanted or found is None else not found)
        words = {True: "TF32 kernels", False: "float32 kernels", None: "no kernel of known kind"}
        seen += f", {words[found]}"
    return together(holds), seen


def tf32_in(kernels: Sequence[str], wanted: bool) -> bool | None:
    """Whether kernels of float32 products ran on TF32 tensor cores; None = their names are silent.

    A name without a type confirms TF32 where it was asked for, and convicts nobody where it was
    not.
    """
    if any(TF32_KERNELS.search(name) for name in kernels):
        return True
    if wanted and any(UNNAMED_TENSOR_KERNELS in name for name in kernels):
        return True
    if any(FLOAT32_KERNELS.search(name) for name in kernels):
        return False
    return None if wanted else False


def prove_adapter(value: str, facts: Facts, settings: Settings) -> Proved:
    """`qlora`: every adapted linear is 4-bit; `lora`: none is; the gate ran in each of them."""
    bits = "4-bit" if value == "qlora" else "unquantised"
    requested = f"{bits} base of every adapted layer, gate in each"
    if name := missing(facts, "layers_adapted", "layers_4bit", "gate_calls"):
        return unknown(requested, name)
    adapted, packed, gated = facts["layers_adapted"], facts["layers_4bit"], facts["gate_calls"]
    # bitsandbytes also packs linears that carry no adapter; those alone would prove nothing.
    packed_adapted = facts.get("adapted_4bit", min(packed, adapted))
    observed = f"{packed_adapted} of {adapted} adapted layers 4-bit ({packed} in all)"
    observed += f", gate in {gated}"
    if facts.get("frozen_bytes") is not None:
        observed += f", frozen weights {mebibytes(facts['frozen_bytes'])}"
    right = packed_adapted == adapted if value == "qlora" else packed == 0
    return Proved(adapted > 0 and right and gated == adapted, requested, observed)


def prove_double_quant(value: bool, facts: Facts, settings: Settings) -> Proved:
    """Read off the live 4-bit layers; without any there are no constants to quantise."""
    requested = f"constants of 4-bit blocks {'quantised too' if value else 'in float32'}"
    quant = facts.get("quant")
    if not quant:
        if facts.get("layers_4bit") == 0:
            return Proved(not value, requested, "no 4-bit layers")
        return unknown(requested, "4-bit layers")
    words = {True: "quantised", False: "in float32"}
    seen = words.get(quant.get("double"), "some quantised, some not")
    return Proved(quant.get("double") is value, requested, f"{seen} ({quant.get('quant_type')})")


MIXED, ALIKE = 0.7, 1e-4
"""Share of the variance of log lengths that lies inside batches whose prompts met at random (all of
it but for chance; halves of a normal distribution hold 36 %); variance that tells nothing."""

ATTENTION_OPERATORS = {
    "eager": "_softmax",
    "sdpa": "scaled_dot_product_attention",
    "flash_attention_2": "flash_attn",
}
# The kernels of the flash-attn package. torch carries its own copy of them, which
# scaled_dot_product_attention runs; cuDNN's (`…_flash_fprop_…`) are named otherwise.
FLASH_KERNELS = re.compile(r"flash(?:::|_fwd_|_bwd_)")
TORCHS_OWN = "pytorch_flash"


def prove_attention(value: str, facts: Facts, settings: Settings) -> Proved:
    """The operators that ran decide, and above them kernel names, whatever is configured.

    Kernel names tell flash-attn alone: the step holds the student's attention and the gate's
    softmax too, so other attention kernels need not be the backbone's.
    """
    requested = f"{ATTENTION_OPERATORS[value]} operators only"
    seen = {name: n for name, n in (facts.get("attention_ops") or {}).items() if n}
    kernels = facts.get("gpu_kernels")
    if not seen and not kernels:
        return unknown(requested, "attention operators")
    observed = f"{counted(seen)}; configured {facts.get('attn_implementation') or 'unknown'}"
    right: bool | None = set(seen) == {ATTENTION_OPERATORS[value]} if seen else None
    if kernels:
        flash = any(FLASH_KERNELS.search(name) and TORCHS_OWN not in name for name in kernels)
        observed += f"; {'flash-attn kernels' if flash else 'no flash-attn kernel'} on the GPU"
        if value == "flash_attention_2":
            right = flash
        elif flash:
            right = False
    return Proved(right, requested, observed)


def prove_checkpointing(value: bool | None, facts: Facts, settings: Settings) -> Proved:
    """The first layer's first sub-module runs once for each forward, twice when recomputed.

    Left to peft (None), 4-bit backbones are recomputed because peft's preparation says so, others
    are not.
    """
    by_peft = value is None and (settings.get("teacher") or {}).get("adapter") == "qlora"
    recomputed = bool(value) or by_peft
    requested = "left to peft, so " if value is None else ""
    requested += "first sub-module runs " + ("twice" if recomputed else "once")
    calls = facts.get("checkpoint_calls") or {}
    forward, after = calls.get("forward"), calls.get("after_backward")
    if not forward or after is None:
        return unknown(requested, "calls of the first sub-module")
    observed = f"{forward} after forward, {after} after backward"
    by = facts.get("gradient_checkpointing_by")
    observed += f", switched on by {'the setting' if by == 'setting' else by}" if by else ""
    holds: list[bool | None] = [after == forward * (2 if recomputed else 1)]
    if by_peft:
        holds.append(by == "peft" if "gradient_checkpointing_by" in facts else None)
    return Proved(together(holds), requested, observed)


def prove_cache(value: bool, facts: Facts, settings: Settings) -> Proved:
    """A cache object that a forward left alive; whether anybody read it is told, not judged."""
    requested = "keys and values kept" if value else "no keys and values kept"
    if "cache" not in facts:
        return unknown(requested, "cache")
    cache = facts["cache"] or {}
    written = cache.get("written_bytes") or 0
    if not written:
        return Proved(not value, requested, "no cache")
    read = "read by a later forward" if cache.get("read") else "never read"
    return Proved(value, requested, f"{mebibytes(written)} written, {read}")


def prove_compile(value: str, facts: Facts, settings: Settings) -> Proved:
    """Graphs were made and steady steps ran in them; past the limit of recompiles none would."""
    requested = "no compiled graph" if value == "off" else f"{value}: steps in compiled graphs"
    if missing(facts, "compile"):
        return unknown(requested, "compilation")
    seen = facts["compile"]
    graphs = seen.get("graphs") or 0
    if not graphs:
        return Proved(value == "off", requested, f"{seen.get('mode')}, no graph")
    reasons = "; ".join(seen.get("break_reasons") or [])
    observed = f"{seen.get('mode')}, {several(graphs, 'graph')}, "
    observed += several(seen.get("breaks") or 0, "break") + (f" ({reasons})" if reasons else "")
    observed += f", {several(seen.get('recompiles') or 0, 'recompile')}"
    if value == "off":
        return Proved(False, requested, observed)
    if seen.get("limit_reached"):
        observed += "; limit of recompiles reached: later steps ran uncompiled"
    ran = seen.get("compiled_calls")
    eager = seen.get("eager_calls") or 0
    if ran is not None:
        observed += f"; {several(ran, 'call')} of compiled code, {eager} of layers left as Python"
    steady = facts.get("steady_steps", 1)
    if not steady:
        observed += "; no steady step"
    as_asked = seen.get("mode") == value and not seen.get("limit_reached") and not eager
    holds = [as_asked, ran != 0, None if ran is None or not steady else True]
    return Proved(together(holds), requested, observed)


def prove_mode(value: str, facts: Facts, settings: Settings) -> Proved:
    """Gates and answers of the observed batch, the gates told apart by the factors that were bound.

    `tail` leaves the history without a gate; `causal` has more gates than prompts, `instance` as
    many. Prompts that show one item alone look alike in both.
    """
    requested = {
        "instance": "one gate for all tokens of a prompt",
        "causal": "gates that change along a prompt",
        "tail": "gates at the end of a prompt only",
    }[value]
    if missing(facts, "gate_use"):
        return unknown(requested, "use of the gates")
    seen = facts["gate_use"]
    observed = f"{several(seen['answers'], 'answer')} of {several(seen['prompts'], 'prompt')}, "
    observed += f"{several(seen['gates'], 'gate')} on {seen['gated_tokens']} of {seen['tokens']} "
    return Proved(mode_of(seen) == value, requested, observed + "tokens")


def mode_of(seen: Mapping[str, int]) -> str:
    """The teacher's mode by the gates that were bound."""
    if seen["gated_tokens"] < seen["tokens"]:
        return "tail"
    return "causal" if seen["gates"] > seen["prompts"] else "instance"


def prove_batching(value: str, facts: Facts, settings: Settings) -> Proved:
    """Prompts in a row of the observed batch; and whether the lengths of those that met differ less
    than the lengths of all.
    """
    requested = {
        "padded": "one prompt a row, lengths that meet at random",
        "grouped": "one prompt a row, similar lengths together",
        "packed": "several prompts a row, one shape",
    }[value]
    if name := missing(facts, "gate_use", "inputs_embeds", "batch_shapes"):
        return unknown(requested, name)
    rows, prompts = facts["inputs_embeds"]["shape"][0], facts["gate_use"]["prompts"]
    shapes = facts["batch_shapes"]
    observed = f"{several(prompts, 'prompt')} in {several(rows, 'row')}, {several(shapes, 'shape')}"
    if rows != prompts or value == "packed":
        masked = facts.get("attention_mask") is not None
        return Proved(value == "packed" and rows != prompts and masked, requested, observed)
    if (facts.get("prompt_batches") or 0) < 2 or missing(facts, "length_variance"):
        return Proved(None, requested, f"{observed}; too few batches to tell how lengths meet")
    variance = facts["length_variance"]
    if variance["all"] < ALIKE:
        return Proved(None, requested, f"{observed}; all prompts are about as long")
    share = variance["inside"] / variance["all"]
    observed += f"; {share:.0%} of the variance of lengths inside batches"
    return Proved((value == "grouped") == (share < MIXED), requested, observed)
