"""Which folders are taken, which are refused and with what words, and that what makes it fast changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from engine import packed_linear as packed_module
from engine.errors import ModelError
from engine.generation import model as model_module
from engine.generation.attention import use_slot_attention
from engine.generation.model import DecodableModel, load_decodable
from engine.packed_linear import PackedLinear, pack_linears, unpack_linears
from engine.recipe import StudentConfig
from tests.support.models import Arch, load, plain_logits, tiny_model

CPU = torch.device("cpu")


def take(folder: Path, *, dtype: torch.dtype = torch.float32) -> DecodableModel:
    return load_decodable(StudentConfig(path=str(folder)), dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_the_usual_models_are_taken(tmp_path: Path, arch: Arch, dtype: torch.dtype) -> None:
    ready = take(tiny_model(tmp_path, arch=arch), dtype=dtype)

    assert ready.is_fast
    assert (ready.vocab_size, ready.max_positions) == (384, 512)
    assert not any(parameter.requires_grad for parameter in ready.model.parameters())


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json there"):
        take(tmp_path / "missing")


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    weights = tiny_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        take(tmp_path)


def test_weights_that_lack_parameters_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))

    with pytest.raises(ModelError, match=r"lack 9 parameters .* 'model\.layers\.2\."):
        take(tmp_path)


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')

    with pytest.raises(ModelError, match="causal language model"):
        take(tmp_path)


def test_a_sliding_window_is_refused_by_name(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]

    with pytest.raises(ModelError, match=r"\(mistral\) .*sliding"):
        take(tmp_path)


def test_a_model_that_ignores_its_mask_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path, arch="gpt2")
    forward = GPT2LMHeadModel.forward

    def maskless(self: GPT2LMHeadModel, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask = torch.zeros_like(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", maskless)

    with pytest.raises(ModelError, match="differs from a plain forward pass"):
        take(tmp_path)


@pytest.fixture
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also layers that are too small for it to pay or too early for it to be exact."""
    monkeypatch.setattr(packed_module, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(packed_module, "_NUM_PLAIN_BLOCKS", 0)


@pytest.mark.usefixtures("pack_all")
def test_what_makes_it_fast_is_undone_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path)
    pack = PackedLinear.pack
    monkeypatch.setattr(PackedLinear, "pack", lambda self, weight: pack(self, 1.5 * weight))

    ready = take(tmp_path)

    assert not ready.is_fast
    assert ready.model.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, PackedLinear) for module in ready.model.modules())


@pytest.mark.usefixtures("pack_all")
def test_packed_layers_compute_the_same_and_can_be_put_back(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, tied=False)).requires_grad_(False)
    expected = plain_logits(model, list(range(40)))

    linears = pack_linears(model, device=CPU)
    assert linears.keys() >= {"lm_head", "model.layers.0.mlp.gate_proj"}
    torch.testing.assert_close(plain_logits(model, list(range(40))), expected, rtol=1e-5, atol=1e-5)

    unpack_linears(model, linears)
    torch.testing.assert_close(plain_logits(model, list(range(40))), expected, rtol=0, atol=0)


def test_small_layers_stay_as_they_are(tmp_path: Path) -> None:
    assert not pack_linears(load(tiny_model(tmp_path)), device=CPU)


def test_the_first_blocks_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(packed_module, "_NUM_PLAIN_BLOCKS", 1)

    linears = pack_linears(load(tiny_model(tmp_path)), device=CPU)

    assert {name.partition(".layers.")[2][:1] for name in linears} == {"1", ""}


def test_a_packed_output_layer_rounds_no_more_than_a_plain_one(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, hidden=576, layers=1, vocab=4096, tied=False)).requires_grad_(False)
    rows = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
    exact = rows.double() @ model.lm_head.weight.double().T
    plain = float((model.lm_head(rows) - exact).square().mean().sqrt())

    assert "lm_head" in pack_linears(model, device=CPU)

    assert float((model.lm_head(rows) - exact).square().mean().sqrt()) < 1.1 * plain


@pytest.mark.parametrize("max_terms", [24, 12, 7])
def test_a_packed_layer_takes_any_leading_shape_and_a_bias(monkeypatch: pytest.MonkeyPatch, max_terms: int) -> None:
    monkeypatch.setattr(packed_module, "_MAX_TERMS", max_terms)
    linear = nn.Linear(24, 40).requires_grad_(False)
    packed = PackedLinear(linear)

    for shape in [(24,), (1, 24), (3, 24), (2, 5, 24), (5, 1, 24)]:
        rows = torch.randn(shape)
        torch.testing.assert_close(packed(rows), linear(rows), rtol=1e-5, atol=1e-5)
    rows = torch.randn(24, 7).T
    torch.testing.assert_close(packed(rows), linear(rows), rtol=1e-5, atol=1e-5)


def test_slot_attention_computes_what_sdpa_does(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, heads=4, kv_heads=2))
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 3, 4]])
    hidden = torch.tensor([[False] * 4, [True, False, False, False]])
    mask = torch.zeros(2, 1, 4, 4).masked_fill(
        torch.ones(4, 4).triu(1).bool() | hidden[:, None, None, :], torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        expected = [model(input_ids=ids, attention_mask=m, use_cache=False).logits for m in (None, mask)]

        assert use_slot_attention(model) == "sdpa"

        for m, logits in zip((None, mask), expected, strict=True):
            actual = model(input_ids=ids, attention_mask=m, use_cache=False).logits
            torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_on_sdpa_keeps_its_attention(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path))
    model.set_attn_implementation("eager")

    assert use_slot_attention(model) is None
    assert model.config._attn_implementation == "eager"


def test_the_check_after_loading_needs_unequal_lengths() -> None:
    assert len({len(sequence) for sequence in model_module._probe_sequences(50)}) > 1
