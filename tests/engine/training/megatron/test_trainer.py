"""What a rank's trainer promises beside the numbers of its steps. Real ranks under gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.recipe import StudentConfig
from engine.training.flops import training_flops
from engine.training.hf import HFTrainer
from engine.training.megatron_student import read_shape
from engine.training.schedule import learning_rate
from tests.engine.training.megatron.rank_cases import (
    LEARNER,
    NUM_STEPS,
    ON_RANKS,
    as_scored,
    make_rollouts,
    num_ranks,
    settings,
)
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.models import load, plain_logits
from tests.support.worlds import Worlds

EP2 = {"data_parallel": 2, "expert_parallel": 2}
TP2_PP2 = {"tensor_parallel": 2, "pipeline_parallel": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_student(name, tmp_path_factory.mktemp("student")) for name in ("qwen3", "moonlight")}


def rollouts_of(name: str, num_rollouts: int = 4) -> Any:
    return make_rollouts(num_rollouts, vocab_size=STUDENTS[name].vocab_size)


def run(worlds: Worlds, function: str, folder: Path, layout: dict[str, Any], *arguments: Any, **changes: Any) -> Any:
    return worlds.run(f"{ON_RANKS}:{function}", num_ranks(layout), settings(folder, layout, **changes), *arguments)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["qwen3", "moonlight"])
def test_what_is_computed_again_is_the_same(
    name: str, recompute: str, folders: dict[str, Path], worlds: Worlds
) -> None:
    steps = [[rollouts_of(name)]]
    layout = {"tensor_parallel": 2}
    plain = run(worlds, "train", folders[name], layout, steps)[0].steps[0]
    again = run(worlds, "train", folders[name], layout | {"recompute": recompute}, steps)[0].steps[0]

    assert again.loss == pytest.approx(plain.loss, rel=1e-6)
    assert again.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
    # Recomputation routes every token a second time, which must not count.
    assert again.metrics.get("router_peak") == plain.metrics.get("router_peak")


def test_a_gradient_that_is_not_finite_stops_every_rank_and_changes_nothing(
    folders: dict[str, Path], worlds: Worlds
) -> None:
    layout = EP2 | {"expert_bias_update_rate": 0.1}
    for said, report, is_same in run(worlds, "spoiled", folders["moonlight"], layout, rollouts_of("moonlight")):
        assert said.startswith("the gradient norm is nan and the loss ")
        assert said.endswith("over 4 rollouts; the weights are unchanged")
        assert report is None
        assert is_same


@pytest.mark.parametrize("overlap", [False, True])
def test_or_is_skipped_and_counted_when_the_recipe_says_so(
    overlap: bool, folders: dict[str, Path], worlds: Worlds
) -> None:
    switches = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    layout = EP2 | switches | {"expert_bias_update_rate": 0.1}
    outcomes = run(worlds, "spoiled", folders["moonlight"], layout, rollouts_of("moonlight"), on_nonfinite="skip")

    assert [(said, is_same) for said, _, is_same in outcomes] == [("", True)] * 2
    report = outcomes[0][1]
    assert (report.step, report.skipped) == (1, True)


@pytest.mark.parametrize("rate", [0.0, 0.125])
def test_the_routers_bias_moves_towards_even_loads_or_stays(
    rate: float, folders: dict[str, Path], worlds: Worlds
) -> None:
    """b ← b + rate · sign(mean load − load)  (arXiv 2408.15664), and padding is no load."""
    rollouts = rollouts_of("moonlight", 5)
    layout = EP2 | {"tensor_parallel": 2, "expert_bias_update_rate": rate}
    num_tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)

    outcomes = run(worlds, "router_biases", folders["moonlight"], layout, rollouts)
    for routers, _ in outcomes:
        assert routers
        for counts, before, after in routers:
            assert float(counts.sum()) == num_tokens * STUDENTS["moonlight"].num_experts_per_tok
            torch.testing.assert_close(after, before + rate * (counts.mean() - counts).sign())
    # The first layer is dense.
    expected = {layer: tuple(counts.long().tolist()) for layer, (counts, _, _) in enumerate(outcomes[0][0], start=1)}
    assert [told for _, told in outcomes] == [expected, {}, {}, {}]


def test_tokens_of_every_expert_are_told_over_all_stages(folders: dict[str, Path], worlds: Worlds) -> None:
    rollouts = rollouts_of("moonlight", 5)
    whole = run(worlds, "router_biases", folders["moonlight"], {}, rollouts)[0][1]

    assert list(whole) == [1, 2, 3]
    layout = EP2 | {"pipeline_parallel": 2}
    assert run(worlds, "router_biases", folders["moonlight"], layout, rollouts)[0][1] == whole


def test_a_step_tells_what_it_cost_and_its_rate_follows_the_schedule(folders: dict[str, Path], worlds: Worlds) -> None:
    rollouts = rollouts_of("moonlight", 5)
    layout = EP2 | {"tensor_parallel": 2, "peak_tflops": 0.25}
    changes: dict[str, Any] = {"schedule": "cosine", "min_lr_share": 0.1}
    told = settings(folders["moonlight"], layout, **changes).learner
    seen = run(worlds, "train", folders["moonlight"], layout, [[rollouts]] * 4, **changes)

    assert [step.lr for step in seen[0].steps] == [
        learning_rate(told, step=step, num_steps=NUM_STEPS) for step in (1, 2, 3, 4)
    ]
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts]
    num_responses = sum(len(rollout.response_ids) for rollout in rollouts)
    flops = training_flops(read_shape(folders["moonlight"]), lengths, num_head_rows=num_responses)
    num_computed = sum(report.num_computed_tokens for one in seen for report in one.reports) / 4
    for step in seen[0].steps:
        metrics = step.metrics
        seconds = [metrics[phase] for phase in ("passes_s", "reduce_s", "update_s")]
        assert all(phase_s > 0 for phase_s in seconds)
        assert metrics["tokens_per_s"] * sum(seconds) == pytest.approx(sum(lengths))
        assert metrics["tflops"] * 1e12 * sum(seconds) * num_ranks(layout) == pytest.approx(flops)
        assert metrics["mfu"] == metrics["tflops"] / 0.25
        assert metrics["padding_share"] == pytest.approx(1 - sum(lengths) / num_computed)
        # Python, torch and Megatron; none of these students takes a megabyte.
        assert 0.1 < metrics["memory_gib"] < 8
        assert 1 <= metrics["router_peak"] <= STUDENTS["moonlight"].n_routed_experts


def test_a_sequence_is_scored_as_transformers_does(folders: dict[str, Path], worlds: Worlds) -> None:
    ids = [3, 9, 27, 4, 55, 6]
    logprobs = plain_logits(load(folders["qwen3"]), ids)[:-1].double().log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    found = run(worlds, "logprobs", folders["qwen3"], TP2_PP2, ids)

    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1:] == [None] * 3
    assert run(worlds, "logprobs", folders["qwen3"], {"data_parallel": 2}, [3]) == [[], None]


def test_held_out_answers_are_measured_as_the_torch_trainer_does(folders: dict[str, Path], worlds: Worlds) -> None:
    rollouts = rollouts_of("qwen3", 5)
    torch_trainer = HFTrainer(
        config=msgspec.structs.replace(LEARNER, backend="hf"),
        student=StudentConfig(path=str(folders["qwen3"])),
        objective=settings(folders["qwen3"]).objective,
        steps=NUM_STEPS,
    )
    torch_trainer.start()
    expected = torch_trainer.evaluate([as_scored(rollout) for rollout in rollouts])

    told = run(worlds, "measured", folders["qwen3"], {"data_parallel": 2, "context_parallel": 2}, rollouts)
    found = {index: result for part in told if part is not None for index, result in part}

    assert len(found) == len(expected)
    for index, theirs in enumerate(expected):
        assert found[index].num_tokens == theirs.num_tokens
        assert found[index].kl_sum == pytest.approx(theirs.kl_sum, rel=1e-5)
        assert found[index].nll_sum == pytest.approx(theirs.nll_sum, rel=1e-5)


def test_half_precision_learns_about_the_same_with_master_weights_in_float32(
    folders: dict[str, Path], worlds: Worlds
) -> None:
    steps = [[rollouts_of("moonlight")]] * 2
    exact = run(worlds, "train", folders["moonlight"], EP2, steps)[0].steps
    half = run(worlds, "train", folders["moonlight"], EP2 | {"dtype": "bfloat16"}, steps)[0].steps

    for ours, theirs in zip(half, exact, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.03)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.1)


def test_calls_in_the_wrong_order_are_refused(folders: dict[str, Path], worlds: Worlds) -> None:
    ((unstarted, unstarted_too, empty),) = run(worlds, "refusals", folders["qwen3"], {}, rollouts_of("qwen3"))

    assert unstarted == unstarted_too == "the trainer holds no model; call start or load first"
    assert empty == "step 1 has no tokens; call accumulate before finish_step"
