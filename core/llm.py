"""The only place that loads language models: hub id, local folder, or an architecture preset with
random weights.

A preset has the real architecture and the real vocabulary size, so its speed and memory are those
of the trained model; its tokenizer is trained in memory on the titles. Nothing has to be
downloaded.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
)

from core.config import InputError, did_you_mean
from core.settings import TeacherSettings

PRESETS: dict[str, dict] = {
    "tiny": dict(
        model_type="opt", hidden_size=128, word_embed_proj_dim=128, ffn_dim=512,
        num_hidden_layers=2, num_attention_heads=4, vocab_size=2048, max_position_embeddings=512,
    ),
    "tiny-llama": dict(
        model_type="llama", hidden_size=128, intermediate_size=352, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=2048, max_position_embeddings=512,
    ),
    "tiny-qwen2": dict(
        model_type="qwen2", hidden_size=128, intermediate_size=352, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=2048, max_position_embeddings=512,
    ),
    "opt-125m": dict(
        model_type="opt", hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072,
        num_hidden_layers=12, num_attention_heads=12, vocab_size=50272,
        max_position_embeddings=2048,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
        max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "llama-2-7b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
"""Shapes as in the published config.json of each model; `tiny*` are for CPUs and tests."""

WEIGHT_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "fp16-mixed": torch.float16,
    "fp16-true": torch.float16,
    "fp8": torch.bfloat16,
}
"""How the frozen backbone is stored. Mixed forms keep fp32 for what is trained; a frozen weight
needs no master.
"""
FLOAT8_CAPABILITY, FLOAT8_MULTIPLE = (8, 9), 16
"""First CUDA capability with float8 products (Ada), and what divides their dimensions."""


def load_tokenizer(name: str, texts: list[str]):
    """The model's own tokenizer, or for a preset one trained on the texts (byte-level BPE, fits the
    vocabulary).

    Raises InputError when the name is no preset, no folder and cannot be had from the hub.
    """
    if name in PRESETS:
        return _train_tokenizer(texts, PRESETS[name]["vocab_size"])
    return _hub(AutoTokenizer.from_pretrained, name)


def load_backbone(
    settings: TeacherSettings, precision: str, device: torch.device, seed: int
) -> PreTrainedModel:
    """The transformer without its LM head, frozen, on the device, in the dtype `precision` asks
    for.

    `qlora` holds its linear layers in NF4, `fp8` multiplies in float8. Presets draw their weights
    with `seed`; the global generator is untouched. Raises InputError where float8 cannot run.
    """
    if precision == "fp8" and (problem := float8_problem(device)):
        raise InputError(f"train.precision: fp8: {problem}")
    name, dtype = settings.llm_model_name, WEIGHT_DTYPES[precision]
    config = preset_config(name) if name in PRESETS else _hub(AutoConfig.from_pretrained, name)
    # The frozen base runs without dropout; what is trained has its own (`lora_dropout`).
    for rate in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    common = {"attn_implementation": settings.attn, "dtype": dtype}
    if name in PRESETS:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            model = AutoModel.from_config(config, **common)
        if settings.adapter == "qlora":
            _quantise(model, dtype, settings.bnb_4bit_use_double_quant)
            model.to(device)
    else:
        if settings.adapter == "qlora":
            common["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
            )
        model = _hub(
            AutoModel.from_pretrained, name, config=config, device_map={"": device}, **common
        )
    model.requires_grad_(False)
    model.config.use_cache = False  # the default of calls that do not say; ours do
    _keep_autograd_on_cpu(model)
    if precision == "fp8":
        multiply_in_float8(model)
    return model


def preset_config(name: str) -> PretrainedConfig:
    """The transformers configuration of a preset."""
    shape = dict(PRESETS[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def float8_problem(device: torch.device) -> str | None:
    """Why products cannot run in float8 on a device, None where they can."""
    if device.type != "cuda":
        return "the CPU has no float8 products; use bf16-mixed"
    found = torch.cuda.get_device_capability(device)
    if found < FLOAT8_CAPABILITY:
        return f"needs CUDA capability 8.9, this GPU has {found[0]}.{found[1]}; use bf16-mixed"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; pip install 'ilora-bench[fp8]', or use bf16-mixed"
    return None


def multiply_in_float8(model: nn.Module, emulate: bool = False) -> None:
    """Have the linear layers of a frozen backbone multiply in float8, before adapters are added.

    torchao casts both factors when they meet, with a scale for each tensor; weights stay as they
    are stored. `emulate` multiplies the rounded numbers in float32, where there are no float8
    products: for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The gradient of a weight has the tokens as its inner dimension, which may be any number.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=_fits_float8)


def _fits_float8(layer: nn.Module, name: str) -> bool:
    """Kernels want both dimensions of a weight in multiples of 16."""
    return all(size % FLOAT8_MULTIPLE == 0 for size in layer.weight.shape)


def float8_layers(model: nn.Module) -> list[nn.Module]:
    """Linear layers that multiply in float8."""
    # Named, for torchao need not be installed.
    return [module for module in model.modules() if type(module).__name__ == "Float8Linear"]


def four_bit_layers(model: nn.Module) -> list[nn.Module]:
    """Linear layers whose weights are really held in 4 bit."""
    # peft's wrapper bears the same class name and shows its base layer's weight: not a layer.
    return [
        module
        for module in model.modules()
        if type(module).__name__ == "Linear4bit"
        and "weight" in module._parameters
        and module.weight.dtype == torch.uint8
    ]


def quantisation(model: nn.Module) -> dict | None:
    """How the 4-bit layers hold their weights, read off their state; None without such layers.

    `double`: the constants of the blocks are quantised too. Layers that differ give "mixed".
    """
    layers = four_bit_layers(model)
    if not layers:
        return None
    found = {
        "quant_type": {layer.weight.quant_state.quant_type for layer in layers},
        "double": {layer.weight.quant_state.nested for layer in layers},
        "compute_dtype": {str(layer.compute_dtype).removeprefix("torch.") for layer in layers},
    }
    return {name: values.pop() if len(values) == 1 else "mixed" for name, values in found.items()}


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def fingerprint(settings: TeacherSettings, model: PreTrainedModel, precision: str) -> dict:
    """What identifies the frozen base of an adapter: checked when a checkpoint is loaded."""
    # The library's version is no part of the model: images and host carry different ones.
    noise = {"transformers_version"}
    config = model.config.to_dict()
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in noise}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "llm_model_name": settings.llm_model_name,
        "revision": getattr(model.config, "_commit_hash", None),
        "adapter": settings.adapter,
        "dtype": str(WEIGHT_DTYPES[precision]).removeprefix("torch."),
        "quant": quantisation(model),
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "weights": _weights_digest(model),
    }


def _weights_digest(model: nn.Module) -> str:
    """Hash of the first numbers of every unpacked tensor: another seed, revision or folder content
    is another base.
    """
    tensors = [p.detach().flatten()[:8] for p in model.parameters() if p.is_floating_point()]
    sample = torch.cat([tensor.float() for tensor in tensors]).cpu().numpy()
    return hashlib.sha256(sample.tobytes()).hexdigest()[:16]


def _quantise(model: PreTrainedModel, compute_dtype: torch.dtype, double: bool) -> None:
    """Put bitsandbytes NF4 layers in place of a random model's linears (`from_pretrained` does it
    for stored ones).
    """
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            packed = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=double,
                quant_type="nf4",
            )
            packed.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
            )
            packed.bias = layer.bias
            setattr(parent, name, packed)
    model.is_loaded_in_4bit = True  # peft reads this to choose its 4-bit layer


def _keep_autograd_on_cpu(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 a forward without gradients repacks 4-bit weights and later training
    loses autograd.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _train_tokenizer(texts: list[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in texts if text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )


def _hub(load, name: str, **options):
    """Call a `from_pretrained`; a failure becomes one sentence naming what would work."""
    try:
        return load(name, **options)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            reason = " ".join(str(error).split())
            raise InputError(
                f"teacher.llm_model_name: the folder '{name}' cannot be loaded ({reason})"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise InputError(
            f"teacher.llm_model_name: '{name}' is no preset, no local folder, and could not be had "
            f"from the hub{did_you_mean(name, PRESETS)}; presets: {', '.join(PRESETS)}. "
            f"({str(error).splitlines()[0]})"
        ) from error
