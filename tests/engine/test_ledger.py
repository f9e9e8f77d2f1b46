"""The ledger writes down each occurrence once, refuses what cannot be, and survives the death of its process."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, RunDirError
from engine.ledger import FILE_NAME, Ledger, Occurrence, State, verify_ledger
from engine.types import Prompt, Rollout, VersionSpan
from tests.support.disk import tiny_disk

ROOT = Path(__file__).resolve().parents[2]


def open_ledger(folder: Path, **changes: object) -> Ledger:
    arguments = {"run_name": "test", "seed": 7, **changes}
    return Ledger.open(folder / FILE_NAME, **arguments)  # type: ignore[arg-type]


def prompt(ticket: int, *, epoch: int | None = None, rows: int = 10) -> Prompt:
    """Ticket t is row t % rows of epoch t // rows."""
    return Prompt(
        rollout_id=ticket,
        epoch=ticket // rows if epoch is None else epoch,
        prompt_index=ticket % rows,
        sample_index=0,
        token_ids=(1, 2),
    )


def rollout(ticket: int, *spans: tuple[int, int, int]) -> Rollout:
    """``spans`` are (version, start, end)."""
    spans = spans or ((0, 0, 3),)
    return Rollout(
        prompt=prompt(ticket),
        response_ids=(5,) * spans[-1][2],
        logprobs=(-1.0,) * spans[-1][2],
        sampling_logprobs=(-1.0,) * spans[-1][2],
        spans=tuple(VersionSpan(version=version, start=start, end=end) for version, start, end in spans),
        finish_reason="length",
    )


def bring(ledger: Ledger, ticket: int, state: State) -> None:
    """Take a new ticket as far as ``state`` (steps: ticket t is trained alone, as the next step)."""
    ledger.dispatched(prompt(ticket))
    if state == "failed":
        ledger.failed(ticket, "too odd")
    if state == "waiting":
        ledger.requeued(ticket, "sampler died")
    if state in ("sampled", "scored", "trained"):
        ledger.sampled(rollout(ticket))
    if state in ("scored", "trained"):
        ledger.scored(ticket)
    if state == "trained":
        ledger.trained([ticket], ledger.steps_done + 1)


def admit(ledger: Ledger, number: int) -> None:
    """So many new tickets, each in a commit of its own."""
    for _ in range(number):
        ledger.dispatched(prompt(ledger.next_ticket()))
        ledger.commit()


def rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """What another process sees."""
    with closing(sqlite3.connect(f"file:{folder / FILE_NAME}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path) as ledger:
        yield ledger


def test_a_rollout_leaves_one_row_that_tells_its_life(tmp_path: Path, ledger: Ledger) -> None:
    ledger.dispatched(prompt(0))
    ledger.requeued(0, "sampler died")
    ledger.dispatched(prompt(0))
    ledger.sampled(rollout(0, (4, 0, 2), (5, 2, 7)))
    ledger.scored(0)
    ledger.trained([0], 1)
    ledger.commit()

    (row,) = rows(
        tmp_path,
        "SELECT epoch, prompt_index, sample_index, state, reason, version_first, version_last, trained_step, "
        "failed_step, num_tokens, attempts FROM rollouts",
    )
    assert row == (0, 0, 0, "trained", "sampler died", 4, 5, 1, None, 7, 2)
    ((spans,),) = rows(tmp_path, "SELECT spans FROM rollouts")
    assert [(s["version"], s["start"], s["end"]) for s in json.loads(str(spans))] == [(4, 0, 2), (5, 2, 7)]


def test_readers_see_what_was_committed_and_nothing_else(tmp_path: Path, ledger: Ledger) -> None:
    ledger.dispatched(prompt(0))
    ledger.commit()
    ledger.dispatched(prompt(1))
    assert rows(tmp_path, "SELECT count(*) FROM rollouts") == [(1,)]
    ledger.commit(durable=True)
    assert rows(tmp_path, "SELECT count(*) FROM rollouts") == [(2,)]
    assert rows(tmp_path, "SELECT value FROM meta WHERE key = 'durable_step'") == [("0",)]


EVENTS: dict[str, Callable[[Ledger, int], None]] = {
    "dispatched": lambda ledger, ticket: ledger.dispatched(prompt(ticket)),
    "sampled": lambda ledger, ticket: ledger.sampled(rollout(ticket)),
    "scored": lambda ledger, ticket: ledger.scored(ticket),
    "trained": lambda ledger, ticket: ledger.trained([ticket], ledger.steps_done + 1),
    "failed": lambda ledger, ticket: ledger.failed(ticket, "bad"),
    "requeued": lambda ledger, ticket: ledger.requeued(ticket, "again"),
}
AFTER: dict[tuple[str, str], State] = {
    ("waiting", "dispatched"): "dispatched",
    ("waiting", "failed"): "failed",
    ("dispatched", "dispatched"): "dispatched",
    ("dispatched", "sampled"): "sampled",
    ("dispatched", "requeued"): "waiting",
    ("dispatched", "failed"): "failed",
    ("sampled", "scored"): "scored",
    ("sampled", "requeued"): "waiting",
    ("sampled", "failed"): "failed",
    ("scored", "trained"): "trained",
    ("scored", "requeued"): "waiting",
    ("scored", "failed"): "failed",
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", ["waiting", "dispatched", "sampled", "scored", "trained", "failed"])
def test_an_event_follows_only_where_it_can(ledger: Ledger, state: State, event: str) -> None:
    bring(ledger, 0, state)
    after = AFTER.get((state, event))
    if after is None:
        with pytest.raises(RuntimeError, match=rf"rollout 0 cannot be '{event}': the ledger has state '{state}'"):
            EVENTS[event](ledger, 0)
        assert ledger.counts()[state] == 1
    else:
        EVENTS[event](ledger, 0)
        assert ledger.counts()[after] == 1
    assert sum(ledger.counts().values()) == 1


def test_one_bad_rollout_leaves_the_whole_step_unwritten(ledger: Ledger) -> None:
    bring(ledger, 0, "scored")
    bring(ledger, 1, "sampled")
    with pytest.raises(RuntimeError, match="rollout 1 cannot be 'trained'"):
        ledger.trained([0, 1], 1)
    with pytest.raises(RuntimeError, match=r"step 1 names rollouts \[0\] twice"):
        ledger.trained([0, 0], 1)
    with pytest.raises(RuntimeError, match="step 2 is recorded after step 0"):
        ledger.trained([0], 2)
    with pytest.raises(RuntimeError, match="without a rollout"):
        ledger.trained([], 1)
    assert ledger.counts()["scored"] == 1
    assert ledger.steps_done == 0


def test_an_occurrence_never_gets_a_second_ticket_nor_a_ticket_a_second_occurrence(ledger: Ledger) -> None:
    bring(ledger, 0, "waiting")
    with pytest.raises(RuntimeError, match="which is not what the ledger has under this ticket"):
        ledger.dispatched(prompt(0, epoch=3))
    with pytest.raises(RuntimeError, match="one occurrence was given two tickets"):
        ledger.dispatched(prompt(1, epoch=0, rows=1))
    with pytest.raises(RuntimeError, match="rollout 5 is dispatched before its turn: the next ticket is 1"):
        ledger.dispatched(prompt(5))
    with pytest.raises(RuntimeError, match="no such row"):
        ledger.scored(9)


def test_rewind_returns_everything_after_the_checkpoint_in_the_order_of_tickets(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        bring(ledger, 0, "trained")  # step 1
        bring(ledger, 1, "failed")  # when 1 step was done
        bring(ledger, 2, "trained")  # step 2: the checkpoint
        bring(ledger, 3, "failed")  # when 2 steps were done
        bring(ledger, 4, "trained")  # step 3
        bring(ledger, 5, "scored")
        bring(ledger, 6, "waiting")
        bring(ledger, 7, "sampled")
    with open_ledger(tmp_path) as ledger:
        waiting = ledger.rewind(2)
        assert [one.rollout_id for one in waiting] == [3, 4, 5, 6, 7]
        assert waiting[0] == Occurrence(rollout_id=3, epoch=0, prompt_index=3, sample_index=0)
        assert ledger.counts() == {
            "waiting": 5, "dispatched": 0, "sampled": 0, "scored": 0, "trained": 2, "failed": 1
        }  # fmt: skip
        assert ledger.steps_done == 2
        assert ledger.next_ticket() == 8
        assert rows(
            tmp_path,
            "SELECT DISTINCT reason, version_first, trained_step, failed_step, num_tokens, spans FROM rollouts "
            "WHERE rollout_id IN (3, 4, 5, 7)",
        ) == [("resumed from step 2", None, None, None, None, None)]
        ledger.dispatched(prompt(4))
        ledger.sampled(rollout(4))
        ledger.scored(4)
        ledger.trained([4], 3)
        assert ledger.verify(3, 1) == []


def test_a_ledger_behind_its_checkpoint_is_refused(ledger: Ledger) -> None:
    bring(ledger, 0, "trained")
    with pytest.raises(CheckpointError, match="checkpoint is of step 2, but the ledger holds 1 of the steps"):
        ledger.rewind(2)


def test_memory_holds_only_what_is_under_way(ledger: Ledger) -> None:
    for ticket in range(50):
        bring(ledger, ticket, "trained")
    bring(ledger, 50, "scored")
    assert list(ledger._live) == [50]


def test_a_second_writer_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    code = f"""
import sys
from engine.ledger import Ledger
from pathlib import Path
ledger = Ledger.open(Path({str(tmp_path / FILE_NAME)!r}), run_name="test", seed=7)
sys.stdout.write("held\\n"); sys.stdout.flush()
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as owner:  # type: ignore[call-overload]
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(RunDirError, match=f"in use by process {owner.pid}"):
            open_ledger(tmp_path)
        owner.kill()
    open_ledger(tmp_path).close()  # the lock goes with its owner, however it ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_name": "other"}, "run_name is 'test' there and 'other' here"),
        ({"seed": 8}, "seed is '7' there and '8' here"),
        ({"identity": {"prompts": "abc"}}, "prompts is None there and 'abc' here"),
    ],
)
def test_a_ledger_of_another_run_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    open_ledger(tmp_path).close()
    with pytest.raises(RunDirError, match=message):
        open_ledger(tmp_path, **changes)
    open_ledger(tmp_path).close()  # and the lock was given back


def test_a_file_that_is_no_ledger_of_this_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    open_ledger(tmp_path).close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(CheckpointError, match="has schema '99', this program writes '1'"):
        open_ledger(tmp_path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(CheckpointError, match="is a database, but not a ledger"):
        open_ledger(tmp_path)
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        open_ledger(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as a ledger"):
        verify_ledger(path, steps=1, rollouts_per_step=1)
    with pytest.raises(CheckpointError, match="no ledger here"):
        verify_ledger(tmp_path / "elsewhere", steps=1, rollouts_per_step=1)


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(RunDirError, match=r"/dev/null.*cannot be written"):
        open_ledger(Path("/dev/null/run"))


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        open_ledger(disk.path).close()
        disk.set_read_only()
        with pytest.raises(RunDirError, match=r"ledger.lock: cannot be written \(Read-only file system\)"):
            open_ledger(disk.path)


def test_a_full_disk_stops_the_run_and_keeps_what_was_committed(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        ledger = open_ledger(disk.path)
        bring(ledger, 0, "trained")
        ledger.commit(durable=True)
        disk.fill()

        with pytest.raises(RunDirError, match=r"cannot be written .*full.*free some space"):
            admit(ledger, 5000)
        with pytest.raises(RunDirError):  # what is in memory can no longer be trusted
            ledger.dispatched(prompt(1))
        ledger.close()
        disk.make_room()
        with open_ledger(disk.path) as again:
            again.rewind(1)
            assert again.verify(1, 1) == []


def test_a_database_that_refuses_a_page_is_reported_the_same_way(ledger: Ledger) -> None:
    """The unprivileged sibling of the full disk: SQLite's own limit raises SQLITE_FULL."""
    ledger.commit()
    ledger._db.execute("PRAGMA max_page_count = 1").fetchall()
    with pytest.raises(RunDirError, match="database or disk is full"):
        admit(ledger, 500)


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="is closed"):
        ledger.dispatched(prompt(0))


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        for ticket in range(4):
            bring(ledger, ticket, "scored")
        ledger.trained([0, 1], 1)
        ledger.trained([2], 2)
    path = tmp_path / FILE_NAME
    assert verify_ledger(path, steps=2, rollouts_per_step=2) == ["step 2 trained 1 rollouts, expected 2"]
    assert verify_ledger(path, steps=1, rollouts_per_step=2) == ["step 2 is recorded, but only 1 steps were expected"]
    assert verify_ledger(path, steps=3, rollouts_per_step=2)[-1] == "step 3 trained 0 rollouts, expected 2"
    late = verify_ledger(path, steps=2, rollouts_per_step=2, max_staleness=0)
    assert late[-1] == "rollout 2, begun under version 0, was trained in step 2: 1 versions late, the bound is 0"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM rollouts WHERE rollout_id = 1")
        db.execute("UPDATE rollouts SET num_tokens = NULL WHERE rollout_id = 0")
    assert verify_ledger(path, steps=2, rollouts_per_step=1) == [
        "rollout 0 was trained in step 1 without a record of its answer",
        "tickets 0 … 3 have 3 rows: some are missing",
    ]


@settings(max_examples=50)  # each opens a file or more
@given(data=st.data())
def test_any_history_with_any_resumption_trains_each_occurrence_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random events, random rewinds to random earlier steps; the file and the counts always agree."""
    folder = tmp_path_factory.mktemp("history")
    ledger = open_ledger(folder)
    for _ in range(data.draw(st.integers(1, 40))):
        live = sorted(ledger._live)
        choice = data.draw(st.sampled_from(["new", "new", "event", "event", "event", "rewind"]))
        if choice == "new" or not live:
            ledger.dispatched(prompt(ledger.next_ticket()))
        elif choice == "event":
            ticket = data.draw(st.sampled_from(live))
            allowed = [event for event in EVENTS if (ledger._live[ticket], event) in AFTER]
            EVENTS[data.draw(st.sampled_from(allowed))](ledger, ticket)
        else:
            step = data.draw(st.integers(0, ledger.steps_done))
            ledger.close()
            ledger = open_ledger(folder)
            waiting = ledger.rewind(step)
            assert [one.rollout_id for one in waiting] == sorted(ledger._live)
            assert set(ledger._live.values()) <= {"waiting"}
    steps = ledger.steps_done
    counts = ledger.counts()
    ledger.close()
    assert dict(rows(folder, "SELECT state, count(*) FROM rollouts GROUP BY state")) == {
        state: number for state, number in counts.items() if number
    }
    assert verify_ledger(folder / FILE_NAME, steps=steps, rollouts_per_step=1) == []


# A real process, really killed.

STEPS, PER_STEP, EVERY = 30, 4, 3


def test_killed_at_random_moments_every_occurrence_is_trained_exactly_once(tmp_path: Path) -> None:
    """A run is killed and resumed until it is through; its "weights" are the list of what was trained."""
    code = f"from pathlib import Path; from tests.engine.test_ledger import drive; drive(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout.split()[-1])  # the last word; log lines come before it
    assert kills >= 10
    assert verify_ledger(tmp_path / FILE_NAME, steps=STEPS, rollouts_per_step=PER_STEP) == []
    weights = json.loads((tmp_path / "checkpoint").read_text())
    trained = rows(tmp_path, "SELECT rollout_id FROM rollouts WHERE state = 'trained' ORDER BY rollout_id")
    assert sorted(weights["trained"]) == [ticket for (ticket,) in trained]
    assert len(weights["trained"]) == STEPS * PER_STEP
    assert rows(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def drive(folder: Path) -> None:
    """In a process of its own, without threads: fork a run, kill it after so many events, fork the next one."""
    moments = random.Random(0)
    kills = 0
    while True:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                run(folder, beat=partial(os.write, writer, b"."))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writer)
        left = moments.randrange(1, 60) if kills < 25 else sys.maxsize
        while left > 0 and (beats := os.read(reader, min(left, 64))):
            left -= len(beats)
        if left == 0:
            os.kill(pid, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                sys.exit(1)
            sys.stdout.write(str(kills))
            return
        kills += 1


def run(folder: Path, *, beat: Callable[[], object]) -> None:
    """A run with a checkpoint every few steps: ``beat`` is called after each thing that reaches the ledger."""
    checkpoint = folder / "checkpoint"
    saved: dict[str, Any] = {"step": 0, "trained": []}
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
    trained: list[int] = saved["trained"]
    ledger = open_ledger(folder)
    waiting = [one.rollout_id for one in ledger.rewind(saved["step"])]
    for step in range(saved["step"] + 1, STEPS + 1):
        admitted: list[int] = []
        while len(admitted) < PER_STEP:
            ticket = waiting.pop(0) if waiting else ledger.next_ticket()
            ledger.dispatched(prompt(ticket))
            beat()
            ledger.sampled(rollout(ticket))
            if ticket % 7 == 3:
                ledger.failed(ticket, "every seventh")
                continue
            ledger.scored(ticket)
            admitted.append(ticket)
            beat()
        ledger.trained(admitted, step)
        trained += admitted
        ledger.commit(durable=step % EVERY == 0)
        beat()
        if step % EVERY == 0:
            aside = folder / "checkpoint.tmp"
            aside.write_text(json.dumps({"step": step, "trained": trained}))
            aside.rename(checkpoint)
            beat()
    ledger.close()
