from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.errors import ModelError, NonFiniteError
from engine.objective_config import ObjectiveConfig, TermConfig
from engine.recipe import StudentConfig
from engine.training.hf import HFTrainer
from engine.training.protocol import Trainer
from engine.types import StepReport
from ops import ForwardKL, divergence
from tests.engine.training.cases import (
    CONFIG,
    VOCAB,
    PlainTrainer,
    Scored,
    make_scored,
    make_step,
    make_trainer,
    started,
    weights,
)
from tests.ops.cases import LargestRows
from tests.support.models import Arch, tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"arch": "llama", "tied": True},
    "llama-untied": {"arch": "llama", "tied": False},
    "qwen3-tied": {"arch": "qwen3", "tied": True},
    "gpt2-tied": {"arch": "gpt2", "tied": True},
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


def run_step(trainer: HFTrainer, micro_batches: Sequence[Sequence[Scored]]) -> StepReport:
    for micro_batch in micro_batches:
        trainer.accumulate(micro_batch)
    return trainer.finish_step()


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        difference = float((tensor.double() - expected[name].double()).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def test_it_is_a_trainer(llama: Path) -> None:
    trainer: Trainer = make_trainer(llama)
    assert trainer.version == 0


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_two_steps_are_those_of_a_plain_float64_script(model: Path, packing: str) -> None:
    trainer, plain = started(model, packing=packing), PlainTrainer(model)

    for seed in range(2):
        step = make_step(seed=seed)
        report = run_step(trainer, [step[:3], step[3:]])
        loss, grad_norm = plain.step(step)
        assert report.loss == pytest.approx(loss, rel=2e-6)
        assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
    assert_same_weights(weights(trainer), plain.weights(), tolerance=1e-6)
    assert trainer.version == 2


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_two_steps_on_a_gpu_are_those_of_a_plain_float64_script(model: Path, packing: str) -> None:
    trainer, plain = started(model, packing=packing, device="cuda", autocast="off"), PlainTrainer(model)

    for seed in range(2):
        step = make_step(seed=seed)
        report = run_step(trainer, [step[:3], step[3:]])
        loss, grad_norm = plain.step(step)
        assert report.loss == pytest.approx(loss, rel=2e-6)
        assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
    found = {name: tensor.cpu() for name, tensor in weights(trainer).items()}
    assert_same_weights(found, plain.weights(), tolerance=1e-6)


TAILS: tuple[Any, ...] = ("bucket", "renormalise", "ignore")
OBJECTIVES = {
    **{f"forward KL, {tail}": ObjectiveConfig(kind="forward_kl", tail=tail) for tail in TAILS},
    **{f"reverse KL, {tail}": ObjectiveConfig(kind="reverse_kl", tail=tail) for tail in TAILS},
    **{f"JSD, {tail}": ObjectiveConfig(kind="jsd", beta=0.3, tail=tail) for tail in TAILS},
    **{f"skew KL, {tail}": ObjectiveConfig(kind="skew_kl", tail=tail) for tail in TAILS},
    "skew reverse KL": ObjectiveConfig(kind="skew_kl", alpha=0.4, reverse=True),
    "student's top-k": ObjectiveConfig(kind="student_topk_reverse_kl", k=3),
    "k1": ObjectiveConfig(kind="sampled_reverse_kl"),
    "k3, clipped": ObjectiveConfig(kind="sampled_reverse_kl", estimator="k3", clip_ratio=1.5),
    "mixture": ObjectiveConfig(
        kind="mixture",
        terms=(
            TermConfig(kind="jsd", weight=0.5),
            TermConfig(kind="student_topk_reverse_kl", k=3, weight=0.3),
            TermConfig(kind="sampled_reverse_kl", clip_ratio=1.5, weight=0.2),
        ),
    ),
    "tempered": ObjectiveConfig(kind="forward_kl", temperature=2.0),
    "clamped": ObjectiveConfig(kind="forward_kl", clamp=3.0),
}


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_trains_as_it_is_defined(llama: Path, objective: ObjectiveConfig, top_k: int) -> None:
    trainer, plain = started(llama, objective=objective), PlainTrainer(llama, objective=objective)
    step = make_step(top_k=top_k, num_top_ids=objective.num_top_ids)

    report = run_step(trainer, [step[:4], step[4:]])
    loss, _ = plain.step(step)
    assert report.loss == pytest.approx(loss, rel=2e-6, abs=1e-7)
    assert_same_weights(weights(trainer), plain.weights(), tolerance=1e-6)
    assert {"teacher_mass", "student_mass", "topk_overlap", "teacher_entropy", "student_entropy"} <= set(report.metrics)


@pytest.fixture(scope="module")
def one_by_one(llama: Path) -> dict[str, Tensor]:
    trainer = started(llama, packing="padded")
    run_step(trainer, [[item] for item in make_step()])
    return weights(trainer)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(7)),
    cuts=st.sets(st.integers(1, 6)),
    packing=st.sampled_from(["packed", "padded"]),
    budget=st.integers(66, 256),
)
def test_order_split_packing_and_budget_do_not_change_the_step(
    llama: Path, one_by_one: dict[str, Tensor], order: list[int], cuts: set[int], packing: str, budget: int
) -> None:
    step = [make_step()[i] for i in order]
    edges = [0, *sorted(cuts), 7]
    micro_batches = [step[a:b] for a, b in pairwise(edges)]
    trainer = started(llama, packing=packing, micro_batch_tokens=budget)

    report = run_step(trainer, micro_batches)
    assert report.num_rollouts == 7
    assert report.num_micro_batches == len(micro_batches)
    assert_same_weights(weights(trainer), one_by_one, tolerance=1e-6)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_same_micro_batches_same_bits(model: Path, packing: str) -> None:
    digests = set()
    for _ in range(2):
        trainer = started(model, packing=packing)
        run_step(trainer, [make_step()[:4], make_step()[4:]])
        digests.add(trainer.digest())

    assert len(digests) == 1


def test_gradient_checkpointing_computes_the_same_step(llama: Path) -> None:
    trainer, plain = started(llama, gradient_checkpointing=True), started(llama)

    run_step(trainer, [make_step()])
    run_step(plain, [make_step()])
    assert_same_weights(weights(trainer), weights(plain), tolerance=1e-7)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_bf16_master_weights_train_and_resume(llama: Path, tmp_path: Path, packing: str) -> None:
    def make() -> HFTrainer:
        return HFTrainer(
            config=msgspec.structs.replace(CONFIG, packing=packing),
            student=StudentConfig(path=str(llama), dtype="bfloat16"),
            objective=ObjectiveConfig(),
            steps=3,
        )

    trainer, resumed = make(), make()
    trainer.start()
    loss = run_step(trainer, [make_step()]).loss
    assert loss == pytest.approx(PlainTrainer(llama).step(make_step())[0], rel=0.05)
    trainer.save(tmp_path)
    resumed.load(tmp_path)
    assert {tensor.dtype for tensor in weights(resumed).values()} == {torch.bfloat16}
    assert run_step(resumed, [make_step()]) == run_step(trainer, [make_step()])
    assert resumed.digest() == trainer.digest()


def test_dropout_in_the_config_is_off(tmp_path: Path) -> None:
    """With it a step would depend on how it is cut into micro-batches."""
    folder = tiny_model(tmp_path, arch="gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}))
    trainer, plain = started(folder), PlainTrainer(folder)

    assert run_step(trainer, [make_step()]).loss == pytest.approx(plain.step(make_step())[0], rel=2e-6)


def test_the_report_counts_what_was_trained_and_computed(llama: Path) -> None:
    step = make_step()
    trainer = started(llama)

    report = trainer.accumulate(step)
    assert report.num_rollouts == 7
    assert report.num_tokens == sum(item.rollout.num_tokens for item in step) == 28
    # The trie of the prompts and of all but the last token of each answer.
    assert report.num_computed_tokens == 6 + 4 + 0 + 0 + 4 + 0 + 1 + 17
    total = sum(loss * item.rollout.num_tokens for loss, item in zip(report.rollout_losses, step, strict=True))
    assert report.loss_sum == pytest.approx(total)
    finished = trainer.finish_step()
    assert finished.loss == pytest.approx(report.loss_sum / 28)
    assert (finished.num_rollouts, finished.num_tokens, finished.num_micro_batches) == (7, 28, 1)
    assert set(finished.metrics) >= {
        "teacher_mass", "student_mass", "topk_overlap", "teacher_entropy", "student_entropy",
    }  # fmt: skip


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_losses_come_in_the_order_of_the_rollouts(llama: Path, packing: str) -> None:
    trainer = started(llama, packing=packing)
    plain = PlainTrainer(llama)

    losses = trainer.accumulate(make_step()).rollout_losses
    for loss, item in zip(losses, make_step(), strict=True):
        values = divergence(ForwardKL(), *plain.rows(item)).values
        assert loss == pytest.approx(float(values.detach().mean()), rel=1e-5)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_evaluate_measures_bucketed_forward_kl_and_likelihood(llama: Path, packing: str, kind: Any) -> None:
    trainer = started(
        llama, packing=packing, micro_batch_tokens=20, objective=ObjectiveConfig(kind=kind, tail="ignore")
    )
    plain = PlainTrainer(llama)
    before = trainer.digest()

    results = trainer.evaluate(make_step())
    for result, item in zip(results, make_step(), strict=True):
        logits, scores = plain.rows(item)
        logits = logits.detach()
        assert result.num_tokens == item.rollout.num_tokens
        assert result.kl_sum == pytest.approx(float(divergence(ForwardKL(), logits, scores).values.sum()), rel=1e-5)
        logprobs = logits.log_softmax(dim=1).gather(1, scores.sampled_ids.unsqueeze(1))
        assert result.nll_sum == pytest.approx(-float(logprobs.sum()), rel=1e-5)
    assert trainer.digest() == before
    assert trainer.evaluate([]) == []


def test_evaluating_between_micro_batches_leaves_the_step_alone(llama: Path) -> None:
    interrupted, plain = started(llama), started(llama)

    interrupted.accumulate(make_step()[:3])
    interrupted.evaluate(make_step())
    run_step(interrupted, [make_step()[3:]])
    run_step(plain, [make_step()[:3], make_step()[3:]])
    assert interrupted.digest() == plain.digest()


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_only_response_positions_meet_the_head_and_only_a_block_at_a_time(llama: Path, packing: str) -> None:
    trainer = started(llama, packing=packing, block_rows=4)

    with LargestRows(VOCAB) as seen:
        trainer.accumulate(make_step())
        trainer.evaluate(make_step())
    assert 0 < seen.num_rows <= 4


def poison(item: Scored) -> Scored:
    logprobs = item.scores.top_logprobs.copy()
    logprobs[0, 0] = np.nan
    return msgspec.structs.replace(item, scores=msgspec.structs.replace(item.scores, top_logprobs=logprobs))


def test_a_loss_that_is_not_finite_stops_with_the_weights_unchanged(llama: Path) -> None:
    trainer = started(llama, on_nonfinite="stop")
    before = trainer.digest()
    step = make_step()

    trainer.accumulate(step[:2])
    with pytest.raises(NonFiniteError, match="loss of 1 of 1 response tokens is not finite; the weights are unchanged"):
        trainer.accumulate([poison(step[5])])
    assert trainer.digest() == before
    assert trainer.version == 0


def test_a_loss_that_is_not_finite_skips_its_step_and_leaves_the_next_one_clean(llama: Path) -> None:
    trainer, plain = started(llama, on_nonfinite="skip"), started(llama)
    before = trainer.digest()
    step = make_step()

    report = run_step(trainer, [step[:2], [poison(step[5])], step[3:]])
    assert report.skipped
    assert not np.isfinite(report.loss)
    assert trainer.digest() == before
    assert trainer.version == 1
    assert not run_step(trainer, [step]).skipped
    run_step(plain, [step])
    assert trainer.digest() == plain.digest()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_changes_no_weight(llama: Path, on_nonfinite: str) -> None:
    trainer = started(llama, on_nonfinite=on_nonfinite)
    before = trainer.digest()
    trainer.accumulate(make_step())
    _parameter(trainer, "model.norm.weight").grad.fill_(float("inf"))  # type: ignore[union-attr]

    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteError, match="gradient norm is inf"):
            trainer.finish_step()
        assert trainer.version == 0
    else:
        report = trainer.finish_step()
        assert report.skipped
        assert trainer.version == 1
    assert trainer.digest() == before


def test_over_the_token_budget_is_refused_with_both_numbers(llama: Path) -> None:
    trainer = started(llama, micro_batch_tokens=20)

    with pytest.raises(ValueError, match=r"has 66 prompt and response tokens, learner\.micro_batch_tokens allows 20"):
        trainer.accumulate(make_step())


def test_scores_of_another_length_are_refused_by_rollout(llama: Path) -> None:
    trainer = started(llama)
    item = make_scored(rollout_id=7, response=(8, 9, 10))
    short = msgspec.structs.replace(item, scores=make_scored(response=(8, 9)).scores)

    with pytest.raises(ValueError, match="rollout 7 has 3 response tokens and its scores have 2 / 2 / 2 rows"):
        trainer.accumulate([short])
    with pytest.raises(ValueError, match="at least one rollout, got none"):
        trainer.accumulate([])
    with pytest.raises(ValueError, match="rollout 0 has an empty prompt or response"):
        trainer.accumulate([make_scored(prompt=())])


def test_lists_of_different_length_train_together(llama: Path) -> None:
    mixed = [make_scored(rollout_id=0, top_k=2), make_scored(rollout_id=1, top_k=6, prompt=(5, 9))]
    together, apart = started(llama), started(llama)

    run_step(together, [mixed])
    run_step(apart, [[item] for item in mixed])
    assert_same_weights(weights(together), weights(apart), tolerance=1e-6)


def test_rollouts_that_keep_different_numbers_of_likely_ids_are_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"keep \[0, 3\] of the student's most likely ids .* told of \[0, 3\]"):
        started(llama).accumulate([make_scored(), make_scored(rollout_id=1, num_top_ids=3)])


def test_a_step_without_tokens_is_a_mistake(llama: Path) -> None:
    trainer = started(llama)

    with pytest.raises(RuntimeError, match="step 1 has no tokens; call accumulate before finish_step"):
        trainer.finish_step()


def test_nothing_works_before_start_or_after_stop(llama: Path) -> None:
    trainer = make_trainer(llama)

    with pytest.raises(RuntimeError, match="holds no model; call start or load first"):
        trainer.digest()
    trainer.start()
    trainer.stop()
    trainer.stop()
    with pytest.raises(RuntimeError, match="holds no model"):
        trainer.accumulate(make_step())


@pytest.mark.parametrize(("wrong", "message"), [("missing", "no config.json there"), ("empty", "not loadable")])
def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path, wrong: str, message: str) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    if wrong == "empty":
        (folder / "config.json").write_text("{}")

    with pytest.raises(ModelError, match=f"student .*student.*: {message}"):
        make_trainer(folder).start()


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])

    with pytest.raises(ModelError, match="not loadable as a causal language model"):
        make_trainer(folder).start()


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))

    with pytest.raises(ModelError, match="the weights lack 9 parameters"):
        make_trainer(folder).start()


def test_a_window_narrower_than_a_rollout_is_refused_for_packed_and_taken_for_padded(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, arch="qwen3")
    config = json.loads((folder / "config.json").read_text())
    windowed = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config | windowed))

    with pytest.raises(ModelError, match=r"cannot run packed: .*set learner.packing=padded"):
        make_trainer(folder).start()
    trainer, plain = started(folder, packing="padded"), PlainTrainer(folder)
    assert run_step(trainer, [make_step()]).loss == pytest.approx(plain.step(make_step())[0], rel=2e-6)


def test_a_head_that_is_more_than_linear_trains_through_the_models_own_logits(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    trainer, plain = started(llama), PlainTrainer(llama)

    report = run_step(trainer, [make_step()])
    assert report.loss == pytest.approx(plain.step(make_step())[0], rel=2e-6)
    assert_same_weights(weights(trainer), plain.weights(), tolerance=1e-6)
    assert trainer.evaluate(make_step())[0].num_tokens == 5


def test_randomness_inside_a_model_is_a_function_of_seed_and_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward

    def noisy(self: LlamaMLP, x: Tensor) -> Tensor:
        out: Tensor = original(self, x)  # type: ignore[no-untyped-call]
        return out * (1.0 + 0.1 * torch.randn_like(x))

    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    reports: list[StepReport] = []
    for _ in range(2):
        trainer = started(llama, packing="padded")
        torch.manual_seed(len(reports))
        before = torch.get_rng_state()
        reports.append(run_step(trainer, [make_step()]))
        assert torch.equal(before, torch.get_rng_state())

    assert reports[0] == reports[1]


@pytest.mark.parametrize("arch", get_args(Arch))
def test_eager_attention_packs_too(tmp_path: Path, arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A boolean mask added to attention scores would be silently wrong."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path, arch=arch)
    original = AutoModelForCausalLM.from_pretrained

    def eager_only(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attn_implementation") == "sdpa":
            raise ValueError("no sdpa here")
        return original(*args, attn_implementation="eager", **kwargs)

    plain = PlainTrainer(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", eager_only)
    trainer = started(folder)
    assert run_step(trainer, [make_step()]).loss == pytest.approx(plain.step(make_step())[0], rel=2e-6)


def test_packed_models_attend_branch_by_branch_where_they_can(model: Path) -> None:
    assert started(model)._loaded.student.layout == "tree"


def test_a_model_that_drops_the_tree_on_its_way_is_packed_with_a_mask(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would attend across branches; the trial at the start sees that."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def deaf(self: LlamaDecoderLayer, *args: Any, tree: object = None, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", deaf)
    trainer, plain = started(llama), PlainTrainer(llama)

    assert trainer._loaded.student.layout == "packed"
    assert run_step(trainer, [make_step()]).loss == pytest.approx(plain.step(make_step())[0], rel=2e-6)


def test_a_model_that_mixes_packed_sequences_is_refused_for_packed(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward

    def recurrent(self: LlamaMLP, x: Tensor) -> Tensor:
        out: Tensor = original(self, x + x.cumsum(dim=1))  # type: ignore[no-untyped-call]
        return out

    monkeypatch.setattr(LlamaMLP, "forward", recurrent)

    with pytest.raises(ModelError, match=r"cannot run packed: its hidden states .*set learner.packing=padded"):
        make_trainer(llama).start()


def _parameter(trainer: HFTrainer, name: str) -> nn.Parameter:
    return dict(trainer._loaded.student.model.named_parameters())[name]


def test_the_learning_rate_follows_the_schedule(llama: Path) -> None:
    trainer = started(llama, schedule="cosine", warmup_steps=2, steps=4)

    rates = [run_step(trainer, [[make_scored()]]).lr for _ in range(4)]
    assert rates[:2] == pytest.approx([CONFIG.lr / 2, CONFIG.lr])
    assert rates[1] > rates[2] > rates[3] > 0
