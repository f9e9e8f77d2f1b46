"""What the torch back end says is what a plain forward pass says, at less cost: prefixes once, few full rows held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from engine.errors import ModelError, NonFiniteError
from teacher.backend_torch import ForwardHead, LinearHead, TorchBackend
from teacher.fingerprint import fingerprint
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, Scores, score_request
from tests.support.models import Arch, load, plain_logits, tiny_model, tiny_tokenizer

TOLERANCE = 1e-4
"""Nats, between float32 answers and a plain float32 forward pass."""


def make_backend(folder: Path, **options: Any) -> TorchBackend:
    backend = TorchBackend(model=str(folder), **options)
    backend.load()
    return backend


def make_request(
    rng: np.random.Generator,
    *,
    prompt: list[int] | None = None,
    num_prompt: int = 7,
    num_response: int = 5,
    top_k: int = 8,
    num_extra: int | None = None,
    vocab_size: int = 384,
) -> ScoreRequest:
    return score_request(
        prompt_ids=prompt if prompt is not None else rng.integers(0, vocab_size, num_prompt).tolist(),
        response_ids=rng.integers(0, vocab_size, num_response).tolist(),
        top_k=top_k,
        extra_ids=None if num_extra is None else rng.integers(0, vocab_size, (num_response, num_extra), np.int32),
    )


def reference_scores(model: PreTrainedModel, request: ScoreRequest) -> Scores:
    """The definition: one plain forward pass, softmax in float64, a stable sort."""
    ids = [*request.prompt_ids.tolist(), *request.response_ids.tolist()]
    logits = plain_logits(model, ids)[len(request.prompt_ids) - 1 : -1]
    logprobs = logits.double().log_softmax(-1).numpy()
    top_ids = np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, : request.top_k]
    extra = None if request.extra_ids is None else np.take_along_axis(logprobs, request.extra_ids.astype(np.int64), 1)
    return Scores(
        top_ids=top_ids.astype(np.int32),
        top_logprobs=np.take_along_axis(logprobs, top_ids, 1).astype(np.float32),
        sampled_logprobs=np.take_along_axis(logprobs, request.response_ids[:, None].astype(np.int64), 1)[:, 0].astype(
            np.float32
        ),
        extra_logprobs=None if extra is None else extra.astype(np.float32),
    )


def assert_same(got: Scores, expected: Scores) -> None:
    # Logits of the two ways differ in the last bits, so neighbours closer than that may change places.
    np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(got.sampled_logprobs, expected.sampled_logprobs, atol=TOLERANCE, rtol=0)
    assert (np.diff(got.top_logprobs, axis=1) <= 0).all()
    assert (got.top_ids == expected.top_ids).mean() > 0.99
    assert [str(array.dtype) for array in (got.top_ids, got.top_logprobs, got.sampled_logprobs)] == [
        "int32",
        "float32",
        "float32",
    ]
    if expected.extra_logprobs is None:
        assert got.extra_logprobs is None
    else:
        assert got.extra_logprobs is not None
        np.testing.assert_allclose(got.extra_logprobs, expected.extra_logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("layout", ["tree", "packed", "padded", "single"])
def test_float32_answers_equal_a_plain_forward_pass(arch: Arch, layout: Any, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, arch=arch)
    backend = make_backend(folder, block_rows=4, padded_tokens=32)
    assert backend.layout == "tree"
    backend.use_layout(layout)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 384, 9).tolist()
    requests = [
        make_request(rng, prompt=prompt, num_extra=3),
        make_request(rng, prompt=prompt, num_response=11, top_k=1),
        make_request(rng, num_prompt=1, num_response=1, top_k=384),
        make_request(rng, num_response=3, top_k=383, num_extra=0),
    ]

    answers = backend.score(requests)

    model = load(folder)
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, reference_scores(model, request))


def test_padding_rows_of_the_output_layer_and_untied_heads_are_scored_like_all(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, vocab=500, tied=False)
    backend = make_backend(folder)
    request = make_request(np.random.default_rng(1), top_k=500, vocab_size=500)

    assert (backend.info.vocab_size, backend.info.tokenizer_size, backend.info.max_top_k) == (500, 384, 500)
    assert_same(backend.score([request])[0], reference_scores(load(folder), request))


def soft_capped_model(folder: Path) -> Path:
    """Gemma 2: logits = cap · tanh(head / cap), and half of its layers see only a window."""
    tiny_tokenizer(folder)
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=6,
        final_logit_softcapping=2.0,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = Gemma2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return folder


def test_a_soft_cap_behind_the_head_is_kept_and_windows_are_not_packed(tmp_path: Path) -> None:
    folder = soft_capped_model(tmp_path)
    backend = make_backend(folder, block_rows=3)
    rng = np.random.default_rng(2)
    requests = [make_request(rng, num_response=n) for n in (9, 4)]

    assert backend.layout == "padded"
    assert isinstance(backend._head, ForwardHead)
    model = load(folder)
    for request, answer in zip(requests, backend.score(requests), strict=True):
        assert_same(answer, reference_scores(model, request))


def test_the_plain_head_is_used_where_the_model_does_nothing_else(teacher_folder: Path) -> None:
    assert isinstance(make_backend(teacher_folder)._head, LinearHead)


def test_a_prompt_shared_by_samples_is_computed_once_and_its_last_row_scored_once(teacher_folder: Path) -> None:
    backend = make_backend(teacher_folder)
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 384, 20).tolist()
    requests = [score_request(prompt_ids=prompt, response_ids=[n, *range(5)], top_k=4) for n in range(8)]

    backend.score(requests)

    statistics = backend.statistics()
    assert statistics.forward_passes_total == 1
    # The last token of a response is scored, not read: 5 of 6 are computed.
    assert statistics.computed_tokens_total == 20 + 8 * 5
    assert statistics.head_rows_total == 1 + 8 * 5


@pytest.mark.parametrize("block_rows", [1, 3, 1000])
def test_never_more_than_a_block_of_full_rows_is_held(
    block_rows: int, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(teacher_folder, block_rows=block_rows)
    rng = np.random.default_rng(4)
    requests = [make_request(rng, num_extra=2) for _ in range(3)]
    expected = make_backend(teacher_folder).score(requests)
    seen: list[int] = []
    layer = torch.mm

    def watched(hidden_RD: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(len(hidden_RD))
        return layer(hidden_RD, *rest, **options)

    monkeypatch.setattr(torch, "mm", watched)
    answers = backend.score(requests)

    assert max(seen) <= block_rows
    assert backend.statistics().peak_block_rows == max(seen)
    assert sum(seen) == 15
    for answer, reference in zip(answers, expected, strict=True):
        assert_same(answer, reference)


def test_a_batch_of_one_has_the_same_bits_whatever_was_scored_before(teacher_folder: Path) -> None:
    backend = make_backend(teacher_folder)
    rng = np.random.default_rng(5)
    request, others = make_request(rng), [make_request(rng, num_response=n) for n in (3, 9)]
    first = backend.score([request])[0]
    backend.score([*others, request])

    again = backend.score([request])[0]

    np.testing.assert_array_equal(again.top_logprobs, first.top_logprobs)
    np.testing.assert_array_equal(again.sampled_logprobs, first.sampled_logprobs)


def edit_weights(folder: Path, name: str, value: float, rows: slice = slice(None)) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][rows] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_uniform_teacher_names_the_lowest_ids(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, tied=False)
    edit_weights(folder, "lm_head.weight", 0.0)

    answer = make_backend(folder).score([make_request(np.random.default_rng(6), top_k=5)])[0]

    assert answer.top_ids.tolist() == [[0, 1, 2, 3, 4]] * 5
    np.testing.assert_allclose(answer.top_logprobs, -np.log(384), rtol=1e-6)


def test_logits_of_minus_infinity_become_the_lowest_log_probability(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(teacher_folder)
    plain = backend._head.logits

    def masked(hidden_RD: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden_RD)
        logits[:, 10:] = -torch.inf
        return logits

    monkeypatch.setattr(backend._head, "logits", masked)
    answer = backend.score([score_request(prompt_ids=[1], response_ids=[20], top_k=11)])[0]

    assert answer.sampled_logprobs.tolist() == [LOWEST_LOGPROB]
    assert answer.top_ids[0, 10] == 10
    assert answer.top_logprobs[0, 10] == LOWEST_LOGPROB
    np.testing.assert_allclose(np.exp(answer.top_logprobs).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error_and_not_an_answer(
    value: float, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(teacher_folder)
    monkeypatch.setattr(backend._head, "logits", lambda hidden_RD: torch.full((len(hidden_RD), 384), value))

    with pytest.raises(NonFiniteError, match="gave logits that are NaN or infinite"):
        backend.score([make_request(np.random.default_rng(7))])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_are_close_and_ordered(dtype: str, teacher_folder: Path) -> None:
    backend = make_backend(teacher_folder, dtype=dtype)
    request = make_request(np.random.default_rng(8), top_k=100)

    answer = backend.score([request])[0]

    expected = reference_scores(load(teacher_folder), request)
    np.testing.assert_allclose(answer.top_logprobs, expected.top_logprobs, atol=0.2)
    ties = np.diff(answer.top_logprobs, axis=1) == 0
    assert ties.any()
    assert (np.diff(answer.top_ids, axis=1)[ties] > 0).all()


def test_info_says_what_the_folder_holds(teacher_folder: Path) -> None:
    info = make_backend(teacher_folder, max_top_k=50, max_length=100).info

    assert (info.model, info.vocab_size, info.tokenizer_size) == ("tiny-teacher", 384, 384)
    assert (info.max_length, info.max_top_k, info.protocol) == (100, 50, 1)
    assert make_backend(teacher_folder).info.max_length == 512


def broken(folder: Path, what: str) -> None:
    match what:
        case "config":
            (folder / "config.json").write_text("{")
        case "architecture":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5Model"]}))
        case "tokenizer":
            for path in folder.glob("token*"):
                path.unlink()
        case "weights":
            (folder / "model.safetensors").write_bytes(b"\0" * 100)
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "tensor":
            tensors = load_file(folder / "model.safetensors")
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        case "everything":
            (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"config or tokenizer in '.*' cannot be read"),
        ("architecture", r"cannot be"),
        ("tokenizer", r"config or tokenizer in '.*' cannot be read"),
        ("weights", r"model in '.*' cannot be loaded"),
        ("no weights", r"model in '.*' cannot be loaded"),
        ("tensor", r"lack 1 tensors of the model, 'model.layers.1.mlp.up_proj.weight' among them"),
        ("everything", r"has no config.json; expected a folder in Hugging Face format"),
    ],
)
def test_a_folder_that_is_not_a_whole_model_is_refused_by_name(what: str, message: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    broken(folder, what)

    with pytest.raises(ModelError, match=message):
        make_backend(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, r"device 'abacus' is none that torch knows"),
        ({"device": "cuda:99"}, r"cannot be loaded"),
        ({"max_length": 513}, r"max_length=513 is more than the 512 positions"),
    ],
)
def test_options_that_the_machine_or_the_model_cannot_meet_are_refused(
    options: dict[str, Any], message: str, teacher_folder: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        make_backend(teacher_folder, **options)


class Words:
    def __init__(self, vocab: dict[str, int]) -> None:
        self._vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


def test_the_fingerprint_is_that_of_tokens_and_ids_alone(tmp_path: Path) -> None:
    same = fingerprint(Words({"a": 0, "b": 1}))

    assert fingerprint(Words({"b": 1, "a": 0})) == same
    assert len(same) == 32
    others = [{"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 1, "c": 2}, {"ab": 0, "": 1}, {"a": 0, "b\udc80": 1}]
    assert len({same, *(fingerprint(Words(vocab)) for vocab in others)}) == 6
    assert fingerprint(tiny_tokenizer(tmp_path / "a")) == fingerprint(tiny_tokenizer(tmp_path / "b"))
    assert fingerprint(tiny_tokenizer(tmp_path / "a")) != fingerprint(tiny_tokenizer(tmp_path / "c", vocab=383))


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_a_gpu_says_what_the_cpu_says(arch: Arch, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, arch=arch)
    rng = np.random.default_rng(9)
    requests = [make_request(rng, num_response=n, num_extra=2) for n in (3, 9)]

    answers = make_backend(folder, device="cuda:0").score(requests)

    sampled: list[npt.NDArray[np.float32]] = [scores.sampled_logprobs for scores in answers]
    for got, expected in zip(sampled, make_backend(folder).score(requests), strict=True):
        np.testing.assert_allclose(got, expected.sampled_logprobs, atol=1e-3)
