"""What the status page is told of a run."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor import snapshot
from engine.monitor.snapshot import SECTIONS, without_common_lines
from engine.monitor.view import RunView
from tests.engine.monitor.story import Log, demo


def view_of(lines: Any) -> RunView:
    view = RunView()
    for line in lines:
        view.apply(line)
    return view


def as_json(view: RunView) -> dict[str, Any]:
    return {name: msgspec.json.decode(msgspec.json.encode(make(view))) for name, make in SECTIONS.items()}


def trained_answer(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "rollout_id": 10 * step,
        "prompt": f"user\nWhy {step}?\nassistant",
        "pieces": ["Be", "cause"],
        "divergences": [0.5, float("nan")],
        "student_logprobs": [-1.0, -2.0],
        "teacher_logprobs": [-0.5, -0.25],
        "versions": [(step - 1, 0, 1), (step, 1, 2)],
        "age": 1,
        "num_tokens": 2,
        "finish_reason": "stop",
        **fields,
    }


def test_a_run_of_which_nothing_is_known_has_every_section() -> None:
    told = as_json(RunView())

    assert told["head"]["phase"] == "starting"
    assert (told["head"]["step"], told["head"]["steps"], told["head"]["started_at"]) == (0, None, None)
    assert told["curves"] == {"loss": [], "held_out": [], "trained": [], "sampled": []}
    assert told["staleness"] == {"ages": [], "mean": None, "limit": None}
    assert told["pipeline"]["stages"][0]["name"] == "prompt_feeder"
    assert all(stage["shares"] is None for stage in told["pipeline"]["stages"])


def test_the_demo_in_numbers() -> None:
    told = as_json(view_of(demo()))

    assert (told["head"]["run"], told["head"]["step"], told["head"]["steps"]) == ("smollm2", 12, 30)
    assert told["head"]["phase"] == "training"
    assert [step for step, _ in told["curves"]["loss"]] == list(range(1, 13))
    assert told["curves"]["held_out"][0]["kl"] == 1.331
    assert told["rates"]["trained_total"] == 12 * 360
    assert told["staleness"]["ages"] == [[0, 36], [1, 60]]
    assert told["staleness"]["mean"] == pytest.approx(0.625)
    assert told["teacher"]["replicas"][0]["words"] == "up"
    assert told["messages"]["faults"]["teacher_outages"] == 1
    sampler = told["pipeline"]["stages"][1]
    assert sampler["channel"] == {"name": "rollouts", "items": 1, "max_items": 16, "to": "teacher_proxy"}
    assert sampler["shares"]["worked"] == pytest.approx(0.86, abs=0.02)


@pytest.mark.parametrize("steps", [1, 12, 30])
def test_shares_are_all_of_the_time(steps: int) -> None:
    for stage in as_json(view_of(demo(steps=steps)))["pipeline"]["stages"]:
        assert sum(stage["shares"].values()) == pytest.approx(1.0)


def test_versions_are_told_apart_by_where_they_are() -> None:
    log = Log()
    log.started()
    for ticket, version in enumerate((2, 3, 3, None)):
        log.line("rollout.dispatched", rollout_id=ticket)
        if version is not None:
            log.span("sampler.rollout", dur_s=1, rollout_id=ticket, num_tokens=4, version_first=version)
    log.line("weights.live", version=3)
    log.step(4, rollout_ids=[0])
    weights = as_json(view_of(log.lines))["weights"]

    assert weights == {"learner": 4, "live": 3, "coming": 4, "sampler": 3, "in_flight": [[3, 2]], "num_sampling": 1}


def test_when_weights_are_live_nothing_is_on_its_way() -> None:
    log = Log()
    log.started()
    log.step(1)
    log.line("weights.live", version=1)

    assert as_json(view_of(log.lines))["weights"]["coming"] is None


def test_a_graph_of_the_users_own_is_drawn_in_its_order() -> None:
    log = Log()
    log.line(
        "run.graph",
        actors=[
            {"name": "prompt_feeder", "consumes": None, "produces": "prompts"},
            {"name": "<b>filter</b>", "consumes": "prompts", "produces": "prompts_<i>"},
            {"name": "sampler", "consumes": "prompts_<i>", "produces": None},
        ],
    )
    stages = as_json(view_of(log.lines))["pipeline"]["stages"]

    assert [stage["name"] for stage in stages] == ["prompt_feeder", "<b>filter</b>", "sampler"]
    assert stages[1]["channel"] == {"name": "prompts_<i>", "items": None, "max_items": None, "to": "sampler"}


def test_replicas_say_since_when_and_why_they_are_away() -> None:
    log = Log()
    for index in range(8):
        log.at(index).line("teacher.replica_changed", replica=f"t{index}:80", state="closed", reason="ready")
    log.at(20).line("teacher.replica_changed", replica="t3:80", state="open", reason="connection refused")
    log.at(30).line("teacher.replica_changed", replica="t3:80", state="open", reason="connection refused")
    view = view_of(log.lines)
    teacher = as_json(view)["teacher"]

    assert (teacher["num_replicas"], teacher["num_up"]) == (8, 7)
    away = teacher["replicas"][3]
    assert (away["name"], away["words"], away["reason"]) == ("t3:80", "away", "connection refused")
    assert away["since"] == view.now - 10


def test_of_very_many_replicas_those_that_are_not_up_are_told() -> None:
    log = Log()
    for index in range(1000):
        state = "open" if index == 999 else "closed"
        log.line("teacher.replica_changed", replica=f"t{index:04}", state=state, reason="")
    teacher = as_json(view_of(log.lines))["teacher"]

    assert (teacher["num_replicas"], teacher["num_up"], len(teacher["replicas"])) == (1000, 999, 256)
    assert teacher["replicas"][-1]["name"] == "t0999"


def test_the_last_five_trained_answers_newest_first_without_what_the_template_says_each_time() -> None:
    log = Log()
    for step in range(1, 8):
        log.line("answer.trained", **trained_answer(step))
    answers = as_json(view_of(log.lines))["answers"]

    assert [answer["step"] for answer in answers["trained"]] == [7, 6, 5, 4, 3]
    assert answers["trained"][0]["prompt"] == "Why 7?"
    assert answers["trained"][0]["divergences"] == [0.5, None]
    assert answers["trained"][0]["versions"] == [[6, 0, 1], [7, 1, 2]]


@given(st.lists(st.text(alphabet="ab\n", max_size=12), max_size=5))
def test_lines_in_common_are_cut_and_nothing_else(prompts: list[str]) -> None:
    cut = without_common_lines(prompts)

    assert len(cut) == len(prompts)
    assert all(short in prompt for short, prompt in zip(cut, prompts, strict=True))
    assert len(set(cut)) == len(set(prompts)), "what differed still differs"


def test_one_prompt_alone_is_left_as_it_is() -> None:
    assert without_common_lines(["user\nhi", "user\nhi"]) == ["user\nhi", "user\nhi"]


def test_a_long_history_of_measurements_is_thinned_and_keeps_its_ends() -> None:
    view = view_of(demo())
    first = view.evaluations[0]
    view.evaluations = [msgspec.structs.replace(first, version=version) for version in range(5_001)]
    versions = [held.version for held in snapshot.curves(view).held_out]

    assert len(versions) <= 502
    assert (versions[0], versions[-1]) == (0, 5_000)


def test_a_thousand_steps_are_told_quickly() -> None:
    """Measured: 1.3 ms on one core of a busy 2-core machine; the bound leaves room for busier ones."""
    view = view_of(demo(steps=1000, of=2000))
    for step in range(1, 6):
        view.apply(Log().line("answer.trained", **trained_answer(step, pieces=["word "] * 512)))
    best_s = 1.0
    for _ in range(5):
        start = time.process_time()
        size = sum(len(msgspec.json.encode(make(view))) for make in SECTIONS.values())
        best_s = min(best_s, time.process_time() - start)

    assert best_s < 0.02
    assert size < 200_000
