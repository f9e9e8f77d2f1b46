"""What the benchmarks decide around their measurements: verdicts, ratios, the kept page, readings of processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from transformers import AutoTokenizer

from engine.load_recipe import load_recipe
from tests.bench import machine
from tests.bench.__main__ import BENCHES, Bench, Done, as_markdown, read_report
from tests.bench.bench_end_to_end import (
    DISTILLATION,
    GKD,
    LOADS,
    SERIAL,
    TOKENS_PER_STEP,
    check_tokens,
    rows_of,
    targets_of,
)
from tests.bench.bench_memory import slope
from tests.bench.end_to_end import workload
from tests.bench.end_to_end.workload import Outcome, Step
from tests.bench.process_clock import cpu_s, new_lines, resident_bytes
from tests.bench.report import OURS, Report, Row, Target, as_text, number

HERE = Path(__file__).parent


def make_outcome(*, cpu_s: float = 1.0, num_tokens: int = TOKENS_PER_STEP, num_steps: int = 4) -> Outcome:
    return Outcome(steps=[Step(cpu_s=cpu_s, num_tokens=num_tokens, loss=1.0)] * num_steps)


def make_report(*, found: float = 2.0, load: str = "much", failures: tuple[str, ...] = ()) -> Report:
    return Report(
        bench="channel hop",
        rows=(
            Row(load=load, contender=OURS, value=0.5, unit="µs"),
            Row(load=load, contender="a rival", value=1.0, unit="µs", ratio=found),
        ),
        targets=(Target(what="a rival", found=found, bound=1.5),),
        failures=failures,
    )


def make_page(*results: Done) -> str:
    at = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
    return as_markdown(
        results,
        at=at,
        revision="0123abc",
        command="make bench",
        machine="2 cores",
        others="Nobody else was there.",
    )


def done(report: Report | None, *, exit_code: int = 0, text: str = "", reports: bool = True) -> Done:
    return Done(Bench("channel", reports=reports), exit_code, 60.0, report, text)


def test_every_benchmark_is_in_the_table_of_the_runner() -> None:
    files = {path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")}

    assert {bench.name for bench in BENCHES} == files


@pytest.mark.parametrize(
    ("found", "at_most", "is_met"), [(1.5, False, True), (1.4, False, False), (1.5, True, True), (1.6, True, False)]
)
def test_a_target_is_met_on_the_right_side_of_its_bound(found: float, at_most: bool, is_met: bool) -> None:
    target = Target(what="it", found=found, bound=1.5, at_most=at_most)

    assert target.is_met is is_met
    assert str(target).endswith("met" if is_met else "MISSED")


def test_what_could_not_be_measured_is_a_miss() -> None:
    assert make_report().is_met
    assert not make_report(failures=("no network",)).is_met


@pytest.mark.parametrize(
    ("value", "text"),
    [(12_345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123"), (0, "0"), (2, "2")],
)
def test_a_number_has_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_the_text_has_a_line_per_row_and_per_target() -> None:
    lines = as_text(make_report()).splitlines()

    assert [line.split()[0] for line in lines[:3]] == ["load", "much", "much"]
    assert lines[-1] == "a rival: 2 × (target ≥ 1.50): met"


def test_a_report_is_read_from_the_last_line() -> None:
    report = make_report()
    text = "what a library says\n" + msgspec.json.encode(report).decode()

    assert read_report(text) == report
    assert read_report("Traceback (most recent call last)") is None
    assert read_report("") is None


def test_the_page_holds_rows_targets_and_failures() -> None:
    page = make_page(done(make_report(found=1.0, failures=("TRL cannot be installed",)), exit_code=1))

    assert "| channel hop | much | a rival | 1 | µs | 1.00 |" in page
    assert "- channel hop: a rival: 1 × (target ≥ 1.50): MISSED" in page
    assert "- channel hop: FAILED: TRL cannot be installed" in page


def test_the_page_shows_what_a_benchmark_said_that_crashed() -> None:
    page = make_page(done(None, exit_code=1, text="Traceback"), done(None, text="all is well", reports=False))

    assert "## channel: FAILED with exit code 1\n\n```text\nTraceback\n```" in page
    assert "## channel: ended well\n\n```text\nall is well\n```" in page


def test_a_load_with_a_bar_does_not_break_the_table() -> None:
    assert "| top 64 \\| tail |" in make_page(done(make_report(load="top 64 | tail")))


def test_a_slope_ignores_a_jump_and_sees_steady_growth() -> None:
    assert slope([100.0] * 50 + [900.0] + [100.0] * 49) == 0
    assert slope([100.0] * 30 + [400.0] * 70) == 0
    assert slope([100.0 + 3 * at for at in range(90)]) == 3
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        slope([1.0])


def test_ratios_are_of_the_same_turn_and_the_better_of_trl_counts() -> None:
    load = LOADS[0]
    outcomes = {
        OURS: [make_outcome(cpu_s=1.0), make_outcome(cpu_s=2.0), make_outcome(cpu_s=1.0)],
        SERIAL: [make_outcome(cpu_s=1.5), make_outcome(cpu_s=3.0), make_outcome(cpu_s=9.0)],
        GKD: [make_outcome(cpu_s=2.0), make_outcome(cpu_s=4.0), make_outcome(cpu_s=2.0)],
        DISTILLATION: [make_outcome(cpu_s=1.7), make_outcome(cpu_s=3.4), make_outcome(cpu_s=1.7)],
    }

    rows = rows_of(load, outcomes)
    targets = targets_of(load, rows)

    assert [row.ratio for row in rows] == [None, 1.5, 2.0, 1.7]
    assert [(target.found, target.bound) for target in targets] == [(1.5, 1.2), (1.7, 1.6)]


@pytest.mark.parametrize("counts", [TOKENS_PER_STEP // 2, TOKENS_PER_STEP + 1])
def test_a_contender_that_trained_other_tokens_is_refused(counts: int) -> None:
    check_tokens("honest", make_outcome(num_tokens=TOKENS_PER_STEP - 3), num_steps=5)

    with pytest.raises(RuntimeError, match=f"expected {TOKENS_PER_STEP}"):
        check_tokens("lazy", make_outcome(num_tokens=counts), num_steps=5)
    with pytest.raises(RuntimeError, match="in each of 4 steps"):
        check_tokens("early", make_outcome(num_steps=3), num_steps=5)


def test_the_workload_has_prompts_of_the_length_it_says_and_no_end_of_sequence(tmp_path: Path) -> None:
    folder = workload.make(tmp_path, vocab=512)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")

    prompts = workload.read_prompts(folder)
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]

    assert len(prompts) == workload.NUM_PROMPTS
    assert (min(lengths), max(lengths)) == workload.PROMPT_TOKENS
    conversation = [{"role": "user", "content": prompts[0]}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == prompts[0]
    assert tokenizer.eos_token_id is None
    for name in ("config.json", "generation_config.json"):
        assert msgspec.json.decode((folder / "student" / name).read_bytes())["eos_token_id"] is None


@pytest.mark.parametrize("path", ["end_to_end/recipe.py", "tiny_recipe.py"])
def test_the_recipes_of_the_benchmarks_hold_together(path: str) -> None:
    load_recipe(HERE / path, [])


def test_the_clock_and_the_memory_of_another_process_can_be_read() -> None:
    busy = "import sys\nfor _ in iter(int, 1): sys.stdin.readline() or sys.exit()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE) as process:
        while cpu_s(process.pid) == 0:
            pass
        assert 0 < cpu_s(process.pid) < 60
        assert resident_bytes(process.pid) > 0
    with pytest.raises(OSError, match=r".+"):
        cpu_s(process.pid)


def test_lines_are_seen_as_they_are_written_and_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    write = f"file = open({str(path)!r}, 'w')\nfor n in range(3): print(n, file=file, flush=True)\nfile.write('torn')"
    with subprocess.Popen([sys.executable, "-c", write]) as process:
        assert list(new_lines(path, process)) == [b"0", b"1", b"2"]


def test_the_share_of_others_is_what_is_busy_and_not_ours() -> None:
    before = machine.Usage(wall_s=0.0, busy_s=100.0, own_s=10.0)
    cores = os.cpu_count() or 1
    after = machine.Usage(wall_s=10.0, busy_s=100.0 + 8.0 * cores, own_s=10.0 + 3.0 * cores)

    assert after.share_of_others(before) == pytest.approx(0.5)
    assert after._replace(busy_s=None).share_of_others(before) is None


def test_the_machine_is_described_without_its_name() -> None:
    text = machine.describe_machine()

    assert platform.node() not in text
    assert "cores" in text
    assert "torch" in text
