"""Loading of backbones and tokenizers: presets, folders, 4 bit, and what a wrong name says."""

import json

import bitsandbytes as bnb
import pytest
import torch
from tiny import CPU, FAMILIES, close
from torch import nn

from core import llm
from core.config import InputError
from core.settings import TeacherSettings

TITLES = ["", "Quiet Harbor III (1987)", "Golden Comet (1950)", "Ω 東京"]
LINEARS = {"tiny": 6, "tiny-llama": 7, "tiny-qwen2": 7}


def load(name: str, adapter: str = "lora", precision: str = "fp32", seed: int = 0, **given):
    settings = TeacherSettings(llm_model_name=str(name), adapter=adapter, **given)
    return llm.load_backbone(settings, precision, CPU, seed)


def states(model, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 128, generator=random)
    with torch.no_grad():
        return model(inputs_embeds=x.to(model.dtype)).last_hidden_state.float()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each preset saved as a user's own model folder, tokenizer beside it."""
    found = {}
    for family in FAMILIES:
        folder = found[family] = tmp_path_factory.mktemp(family)
        load(family, seed=4).save_pretrained(folder)
        llm.load_tokenizer(family, TITLES).save_pretrained(folder)
    return found


# ---- presets ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_frozen_seeded_and_leaves_the_generator_alone(family):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = load(family, seed=1)
    assert torch.equal(torch.rand(3), wanted)
    assert not any(p.requires_grad for p in first.parameters())
    assert torch.equal(states(first), states(load(family, seed=1)))
    assert not torch.equal(states(first), states(load(family, seed=2)))
    assert not first.config.use_cache
    assert not any("lm_head" in name for name, _ in first.named_parameters())


def test_the_frozen_base_runs_without_dropout():
    model = load("tiny").train()
    assert llm.preset_config("tiny").dropout > 0  # the architecture's own default
    assert torch.equal(states(model), states(model))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("opt-125m", 125_239_296), ("qwen2.5-0.5b", 494_032_768), ("llama-2-7b", 6_607_343_616)],
)
def test_big_presets_have_the_size_of_their_names(name, parameters):
    """Parameters without LM head; built on the meta device, so nothing is allocated."""
    with torch.device("meta"):
        model = llm.AutoModel.from_config(llm.preset_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for(attn):
    model = load("tiny-llama", attn=attn)
    assert model.config._attn_implementation == attn
    assert close(states(model), states(load("tiny-llama")), 1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", "float32"),
        ("tf32", "float32"),
        ("bf16-mixed", "bfloat16"),
        ("bf16-true", "bfloat16"),
        ("fp16-mixed", "float16"),
        ("fp16-true", "float16"),
    ],
)
def test_the_backbone_is_stored_as_precision_says(precision, dtype):
    dense = load("tiny", precision=precision)
    assert {str(p.dtype) for p in dense.parameters()} == {f"torch.{dtype}"}
    packed = load("tiny", "qlora", precision)
    assert {str(p.dtype) for p in packed.parameters()} == {f"torch.{dtype}", "torch.uint8"}
    assert {m.compute_dtype for m in packed.modules() if isinstance(m, bnb.nn.Linear4bit)} == {
        getattr(torch, dtype)
    }


# ---- 4 bit ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_really_in_four_bit(family):
    dense, packed = load(family), load(family, "qlora")
    assert llm.four_bit_layers(dense) == []
    assert len(llm.four_bit_layers(packed)) == 2 * LINEARS[family]
    assert not any(type(m) is nn.Linear for m in packed.modules())
    error = (states(packed) - states(dense)).norm() / states(dense).norm()
    assert 0.001 < error < 0.2  # it is another, but a near, function


def test_a_layer_that_was_never_packed_does_not_count():
    """The class alone proves nothing: weights are packed when the layer reaches its device."""
    assert llm.four_bit_layers(nn.Sequential(bnb.nn.Linear4bit(8, 8), nn.Linear(8, 8))) == []


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_double_quantisation_is_read_off_the_layers(folders, stored, double):
    name = folders["tiny"] if stored else "tiny"
    model = load(name, "qlora", "bf16-mixed", seed=4, bnb_4bit_use_double_quant=double)
    assert llm.quantisation(model) == {
        "quant_type": "nf4",
        "double": double,
        "compute_dtype": "bfloat16",
    }
    constants = {layer.weight.quant_state.absmax.dtype for layer in llm.four_bit_layers(model)}
    assert constants == {torch.uint8 if double else torch.float32}
    single = load(name, "qlora", "bf16-mixed", seed=4)
    assert close(states(model), states(single), 0.1)
    assert torch.equal(states(model), states(single)) != double


def test_layers_quantised_in_two_ways_are_called_mixed():
    model = load("tiny", "qlora")
    other = load("tiny", "qlora", bnb_4bit_use_double_quant=True)
    model.decoder.layers[0] = other.decoder.layers[0]
    assert llm.quantisation(model)["double"] == "mixed"
    assert llm.quantisation(load("tiny")) is None


def test_the_bytes_of_a_cache_are_its_keys_and_values():
    model = load("tiny-qwen2", precision="bf16-true")  # four heads for queries, two for keys
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16)
    cache = model(inputs_embeds=x, use_cache=True).past_key_values
    layers, keys_and_values, rows, tokens, width, bytes_each = 2, 2, 3, 5, 64, 2
    expected = layers * keys_and_values * rows * tokens * width * bytes_each
    assert llm.cache_bytes(cache) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_without_gradients_keeps_later_training_differentiable(family):
    model = load(family, "qlora")
    expected = packed_gradient(model, evaluate_first=False)
    assert expected.any()
    assert close(packed_gradient(model, evaluate_first=True), expected, 1e-5)


def packed_gradient(model, evaluate_first: bool) -> torch.Tensor:
    """Gradient of the input embeddings in training, perhaps after an evaluation."""
    if evaluate_first:
        states(model.eval())
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model.train()
    output = model(inputs_embeds=x).last_hidden_state
    return torch.autograd.grad(output[..., 0].sum(), x)[0]


@pytest.mark.skipif(
    not bnb.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu,
    reason="this CPU has no AVX512-BF16: the hazard does not exist here",
)
@pytest.mark.parametrize("family", ["tiny", "tiny-llama"])
def test_the_guard_of_the_packed_weights_matters(family):
    """With the switch left on, one evaluation takes the layers out of the graph or breaks them."""
    model = load(family, "qlora")
    expected = packed_gradient(model, evaluate_first=False)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.support_avx512bf16_for_cpu is False
            module.support_avx512bf16_for_cpu = True
    try:
        found = packed_gradient(model, evaluate_first=True)
    except RuntimeError:
        return
    assert not close(found, expected, 0.1)


# ---- folders and names ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_folder_is_loaded_like_the_preset_it_was_saved_from(folders, family, adapter, precision):
    if precision == "bf16-mixed" and adapter == "lora" and family == "tiny":
        precision = "bf16-true"
    saved = load(folders[family], adapter, precision)
    preset = load(family, adapter, precision="fp32", seed=4)
    assert len(llm.four_bit_layers(saved)) == len(llm.four_bit_layers(preset))
    assert not any(p.requires_grad for p in saved.parameters())
    assert not saved.config.use_cache
    assert saved.config._attn_implementation == "sdpa"
    for module in saved.modules():
        assert getattr(module, "support_avx512bf16_for_cpu", False) is False
    exact = precision == "fp32"
    assert close(states(saved), states(preset), 1e-6 if exact else 0.1)
    assert torch.equal(states(saved.train()), states(saved))  # no dropout here either


def test_a_folder_brings_its_own_tokenizer(folders):
    own = llm.load_tokenizer("tiny", TITLES)
    loaded = llm.load_tokenizer(str(folders["tiny"]), ["other texts are not used"])
    for title in TITLES:
        assert loaded(title)["input_ids"] == own(title)["input_ids"]


@pytest.mark.parametrize("name", ["no-such/model", "tiny-lama", "a b!", "./no/such/folder"])
def test_an_unknown_name_is_one_sentence(name):
    for attempt in (lambda: load(name), lambda: llm.load_tokenizer(name, TITLES)):
        with pytest.raises(InputError) as failure:
            attempt()
        text = str(failure.value)
        assert text.startswith(f"teacher.llm_model_name: '{name}' is no preset, no local folder")
        assert "\n" not in text
        assert all(preset in text for preset in llm.PRESETS)
        assert ("did you mean tiny-llama?" in text) == (name == "tiny-lama")


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    (tmp_path / "readme").write_text("nothing")
    for attempt in (lambda: load(tmp_path), lambda: llm.load_tokenizer(str(tmp_path), TITLES)):
        with pytest.raises(InputError) as failure:
            attempt()
        assert str(failure.value).startswith("teacher.llm_model_name: ")
        assert str(tmp_path) in str(failure.value)
        assert "\n" not in str(failure.value)


# ---- tokenizer and fingerprint ----


def test_a_presets_tokenizer_fits_its_vocabulary_and_loses_nothing():
    tokenizer = llm.load_tokenizer("tiny", [title * 50 for title in TITLES])
    assert len(tokenizer) <= llm.PRESETS["tiny"]["vocab_size"]
    for text in [*TITLES[1:], "words it has never seen: žluťoučký"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text
    assert tokenizer.eos_token_id is not None


def prints(name: str, adapter: str = "lora", precision: str = "fp32", seed: int = 0, **given):
    settings = TeacherSettings(llm_model_name=str(name), adapter=adapter, **given)
    return llm.fingerprint(settings, llm.load_backbone(settings, precision, CPU, seed), precision)


def test_the_fingerprint_tells_bases_apart(tmp_path):
    own = prints("tiny")
    assert prints("tiny") == own
    assert json.loads(json.dumps(own)) == own
    model = load("tiny")
    model.config.transformers_version = "another"
    assert llm.fingerprint(TeacherSettings(), model, "fp32") == own
    assert prints("tiny-llama")["config"] != own["config"]
    assert prints("tiny", adapter="qlora")["adapter"] == "qlora"
    assert prints("tiny", precision="bf16-true")["dtype"] == "bfloat16"
    double = prints("tiny", "qlora", bnb_4bit_use_double_quant=True)
    assert double["quant"] != prints("tiny", "qlora")["quant"]
    # Same shape, other numbers: another seed of a preset, or a folder whose content changed.
    assert prints("tiny", seed=1)["weights"] != own["weights"]
    assert prints("tiny", "qlora", seed=1)["weights"] != prints("tiny", "qlora")["weights"]
    for seed in (0, 1):
        load("tiny", seed=seed).save_pretrained(tmp_path)
        assert (prints(tmp_path)["weights"] == own["weights"]) == (seed == 0)
