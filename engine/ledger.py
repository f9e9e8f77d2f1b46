"""The book of a run: every prompt occurrence, where it is and what became of it, in one SQLite file.

It decides which events may follow which, so that an occurrence is trained once or fails once and never both; it knows
no actor, and the answers themselves are not in it. The file is open to any reader while the run goes on::

    sqlite3 runs/NAME/ledger.sqlite "SELECT state, count(*) FROM rollouts GROUP BY state"

Table ``rollouts``, one row per prompt occurrence, never a second one:

    rollout_id     INTEGER  ticket: place in the order of admission, counted from 0 without gaps; primary key
    epoch, prompt_index, sample_index    INTEGER  identity; unique together
    state          TEXT     waiting     must be sampled (again): it went back to the queue, or the run was resumed
                            dispatched  a sampler has it
                            sampled     the answer is complete, the teacher has not spoken yet
                            scored      ready to be trained
                            trained     final: part of step ``trained_step``
                            failed      final: left out for ``reason``
    reason         TEXT     why it failed, or why it last went back to the queue
    version_first, version_last    INTEGER  policy versions of the first and the last response token
    trained_step   INTEGER  the step it was trained in, counted from 1
    failed_step    INTEGER  steps that were done when it failed
    num_tokens     INTEGER  response tokens
    attempts       INTEGER  times it was given to a sampler
    spans          TEXT     JSON list of {"version", "start", "end", "stale_kv"} over the response tokens

Table ``meta`` (key, value): ``schema``, ``run_name``, ``seed`` and whatever else gives a ticket its meaning.

Exactly once, provable: no row of ``rollouts`` can hold an identity twice (UNIQUE), and with P rollouts per step ::

    SELECT trained_step, count(*) FROM rollouts WHERE state = 'trained' GROUP BY trained_step HAVING count(*) <> P

is empty. ``verify_ledger`` asks this and more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NoReturn, Self, cast

import msgspec
import structlog

from engine.errors import CheckpointError, RunDirError
from engine.types import Prompt, Rollout

__all__ = ["FILE_NAME", "Ledger", "Occurrence", "State", "verify_ledger"]

log = structlog.get_logger(__name__)

State = Literal["waiting", "dispatched", "sampled", "scored", "trained", "failed"]

FILE_NAME: Final = "ledger.sqlite"
SCHEMA: Final = "1"
STATES: Final[tuple[State, ...]] = ("waiting", "dispatched", "sampled", "scored", "trained", "failed")

# Which states an event may find. What is not here is a bug in the caller and stops the run before it is written down.
_BEFORE: Final[Mapping[str, tuple[State, ...]]] = {
    "dispatched": ("waiting", "dispatched"),
    "sampled": ("dispatched",),
    "scored": ("sampled",),
    "trained": ("scored",),
    "failed": ("waiting", "dispatched", "sampled", "scored"),
    "requeued": ("dispatched", "sampled", "scored"),
}

# Pages of write-ahead log (4 KiB each) before SQLite folds them into the file by itself: that costs an fsync on the
# event loop, so it is left to durable commits unless a run makes 32 MiB of log between two of them.
_WAL_PAGES: Final = 8192
_BUSY_TIMEOUT_S: Final = 5.0

_CREATE: Final = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE rollouts (
        rollout_id INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL,
        prompt_index INTEGER NOT NULL,
        sample_index INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'dispatched', 'sampled', 'scored', 'trained', 'failed')),
        reason TEXT,
        version_first INTEGER,
        version_last INTEGER,
        trained_step INTEGER,
        failed_step INTEGER,
        num_tokens INTEGER,
        attempts INTEGER NOT NULL,
        spans TEXT,
        CHECK ((state = 'trained') = (trained_step IS NOT NULL)),
        CHECK ((state = 'failed') = (failed_step IS NOT NULL)),
        UNIQUE (epoch, prompt_index, sample_index)
    )""",
)

_encode_spans = msgspec.json.Encoder().encode


class Occurrence(msgspec.Struct, frozen=True, kw_only=True):
    """A ticket and the occurrence that it stands for."""

    rollout_id: int
    epoch: int
    prompt_index: int
    sample_index: int


class Ledger:
    """The one writer of a run's ledger. Made by ``open``; used from one thread; no method waits for another process.

    Events go into an open transaction and are visible to readers, and safe from SIGKILL, after ``commit``; they are
    safe from a power cut after ``commit(durable=True)``. A killed run leaves the last commit. An event that its row's
    state does not allow raises ``RuntimeError`` and changes nothing. Once a write has failed (``RunDirError``), every
    later call fails in the same way: the run has to stop and be resumed.

    Memory grows with the occurrences that are under way, not with the run.
    """

    def __init__(self, *, path: Path, db: sqlite3.Connection, lock: int | None) -> None:
        self._path = path
        self._db = db
        self._lock = lock
        self._closed = False
        self._failure: sqlite3.Error | None = None
        self._live: dict[int, State] = {}
        self._counts: dict[State, int] = dict.fromkeys(STATES, 0)
        self._next_ticket = 0
        self._steps_done = 0

    @classmethod
    def open(cls, path: Path, *, run_name: str, seed: int, identity: Mapping[str, str] | None = None) -> Ledger:
        """Open the ledger at ``path`` for writing; make it when it is not there.

        The lock beside it (``ledger.lock``, with the owner's process id in it) is held until ``close`` or the end of
        the process. ``identity`` is whatever else must not change between the start of a run and its resumption because
        a ticket would then mean another occurrence (digest of the prompts, samples per prompt, …).

        Raises:
            RunDirError: the folder cannot be written, another process has the ledger, or it belongs to another run.
            CheckpointError: the file is damaged, or was written by another version of this program.
        """
        path = Path(path)
        expected = {"schema": SCHEMA, "run_name": run_name, "seed": str(seed), **(identity or {})}
        lock = _take_lock(path.with_suffix(".lock"))
        try:
            db = _connect(path, expected)
        except BaseException:
            os.close(lock)
            raise
        ledger = cls(path=path, db=db, lock=lock)
        try:
            ledger._load()
        except BaseException:
            ledger._release()
            raise
        return ledger

    @classmethod
    def in_memory(cls, *, run_name: str, seed: int) -> Ledger:
        """One that no file holds and no other process sees: a simulation's."""
        path = Path(":memory:")
        return cls(path=path, db=_connect(path, {"schema": SCHEMA, "run_name": run_name, "seed": str(seed)}), lock=None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._failure else "open"
        counts = ", ".join(f"{number} {name}" for name, number in self._counts.items() if number)
        return f"<Ledger {str(self._path)!r} {state}: {counts or 'empty'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Events.

    def dispatched(self, prompt: Prompt) -> None:
        """A sampler gets this occurrence, for the first time or again.

        A new ticket must be the next one: a gap would be an occurrence that a resumed run does not know of.
        """
        rollout_id = prompt.rollout_id
        if rollout_id in self._live:
            self._check("dispatched", rollout_id)
            identity = (rollout_id, prompt.epoch, prompt.prompt_index, prompt.sample_index)
            cursor = self._execute(
                "UPDATE rollouts SET state = 'dispatched', attempts = attempts + 1, version_first = NULL, "
                "version_last = NULL, num_tokens = NULL, spans = NULL "
                "WHERE rollout_id = ? AND epoch = ? AND prompt_index = ? AND sample_index = ?",
                identity,
            )
            if cursor.rowcount != 1:
                raise RuntimeError(
                    f"rollout {rollout_id} came back as (epoch, prompt, sample) {identity[1:]}, which is not what the "
                    f"ledger has under this ticket ({self._row(rollout_id)}); did the order of the prompts change?"
                )
            self._move(rollout_id, "dispatched")
            return
        if rollout_id != self._next_ticket:
            if rollout_id < self._next_ticket:
                self._refuse("dispatched", rollout_id)
            raise RuntimeError(
                f"rollout {rollout_id} is dispatched before its turn: the next ticket is {self._next_ticket}"
            )
        try:
            self._execute(
                "INSERT INTO rollouts (rollout_id, epoch, prompt_index, sample_index, state, attempts) "
                "VALUES (?, ?, ?, ?, 'dispatched', 1)",
                (rollout_id, prompt.epoch, prompt.prompt_index, prompt.sample_index),
            )
        except sqlite3.IntegrityError as error:
            raise RuntimeError(
                f"rollout {rollout_id} is (epoch, prompt, sample) ({prompt.epoch}, {prompt.prompt_index}, "
                f"{prompt.sample_index}), which already has a row: one occurrence was given two tickets"
            ) from error
        self._next_ticket = rollout_id + 1
        self._live[rollout_id] = "dispatched"
        self._counts["dispatched"] += 1

    def sampled(self, rollout: Rollout) -> None:
        """The student's answer is complete."""
        rollout_id = rollout.rollout_id
        self._check("sampled", rollout_id)
        self._execute(
            "UPDATE rollouts SET state = 'sampled', version_first = ?, version_last = ?, num_tokens = ?, spans = ? "
            "WHERE rollout_id = ?",
            (
                rollout.version_first,
                rollout.version_last,
                rollout.num_tokens,
                _encode_spans(rollout.spans).decode(),
                rollout_id,
            ),
        )
        self._move(rollout_id, "sampled")

    def scored(self, rollout_id: int) -> None:
        """The teacher has spoken."""
        self._check("scored", rollout_id)
        self._execute("UPDATE rollouts SET state = 'scored' WHERE rollout_id = ?", (rollout_id,))
        self._move(rollout_id, "scored")

    def trained(self, rollout_ids: Sequence[int], step: int) -> None:
        """These rollouts, all of them, made step ``step`` (counted from 1); steps come one after the other."""
        if step != self._steps_done + 1:
            raise RuntimeError(f"step {step} is recorded after step {self._steps_done}: steps must follow one another")
        if not rollout_ids:
            raise RuntimeError(f"step {step} is recorded without a rollout")
        if len(set(rollout_ids)) != len(rollout_ids):
            twice = sorted({rollout_id for rollout_id in rollout_ids if rollout_ids.count(rollout_id) > 1})
            raise RuntimeError(f"step {step} names rollouts {twice} twice")
        for rollout_id in rollout_ids:
            self._check("trained", rollout_id)
        for rollout_id in rollout_ids:
            self._execute(
                "UPDATE rollouts SET state = 'trained', trained_step = ? WHERE rollout_id = ?", (step, rollout_id)
            )
            self._end(rollout_id, "trained")
        self._steps_done = step

    def failed(self, rollout_id: int, reason: str) -> None:
        """This occurrence will never be trained, for ``reason``."""
        self._check("failed", rollout_id)
        self._execute(
            "UPDATE rollouts SET state = 'failed', reason = ?, failed_step = ? WHERE rollout_id = ?",
            (reason, self._steps_done, rollout_id),
        )
        self._end(rollout_id, "failed")

    def requeued(self, rollout_id: int, reason: str) -> None:
        """Its answer, or the half of it, was lost; it will be dispatched again."""
        self._check("requeued", rollout_id)
        self._execute(
            "UPDATE rollouts SET state = 'waiting', reason = ?, version_first = NULL, version_last = NULL, "
            "num_tokens = NULL, spans = NULL WHERE rollout_id = ?",
            (reason, rollout_id),
        )
        self._move(rollout_id, "waiting")

    # The transaction and the end.

    def commit(self, *, durable: bool = False) -> None:
        """Make every event so far safe from the death of this process; with ``durable`` also from a power cut (fsync).

        A checkpoint of step n must be renamed into place only after a durable commit that holds step n: a ledger that
        is ahead of the checkpoint is rewound, one that is behind it would train the difference twice.

        Raises:
            RunDirError: the disk is full or read-only; what was committed before is intact.
        """
        self._usable()
        try:
            if self._db.in_transaction:
                self._db.execute("COMMIT")
            if durable:
                # FULL syncs the log after a commit, and with it all commits before; it cannot be set inside one.
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute(
                    "INSERT OR REPLACE INTO meta VALUES ('durable_step', ?)",
                    (str(self._steps_done),),
                )
                self._db.execute("COMMIT")
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                self._db.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Commit, close the file and give back the lock. Idempotent; a ledger whose write failed only lets go."""
        if self._closed:
            return
        try:
            if self._failure is None:
                self.commit()
        finally:
            self._release()

    # What is known.

    @property
    def path(self) -> Path:
        return self._path

    @property
    def steps_done(self) -> int:
        """The last step that ``trained`` recorded."""
        return self._steps_done

    def counts(self) -> dict[State, int]:
        """Rows in each state, the uncommitted events included; O(1)."""
        return dict(self._counts)

    def ages(self) -> dict[int, int]:
        """Trained rollouts by age: versions between their first token and the step that trained on them."""
        self._usable()
        found = self._db.execute(
            "SELECT trained_step - 1 - version_first AS age, count(*) FROM rollouts WHERE state = 'trained' "
            "GROUP BY age ORDER BY age"
        )
        return dict(found.fetchall())

    def next_ticket(self) -> int:
        """One after the largest rollout id."""
        return self._next_ticket

    def check_holds(self, step: int) -> None:
        """Whether a checkpoint of ``step`` can be of this ledger's history.

        Raises:
            CheckpointError: the ledger does not hold all steps up to ``step``.
            RunDirError: it cannot be read.
        """
        try:
            (held,) = self._db.execute(
                "SELECT count(DISTINCT trained_step) FROM rollouts WHERE trained_step <= ?", (step,)
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
        if held != step:
            raise CheckpointError(
                f"{self._path}: the checkpoint is of step {step}, but the ledger holds {held} of the steps up to it: "
                "they are not of one history; resume from an older checkpoint or start a new run in another folder"
            )

    def rewind(self, step: int) -> list[Occurrence]:
        """Go back to the checkpoint of ``step`` (0: the student as loaded): called once at resume, before any event.

        Every row that is unfinished, was trained after ``step``, or failed when ``step`` or more steps were done is
        ``waiting`` again. (A failure is replayed, not remembered: the run without the interruption met it in the same
        place, and whatever took its place is rewound with it.) The caller admits what is returned before any new
        ticket. Committed durably.

        Returns:
            The waiting occurrences in the order of their tickets.

        Raises:
            CheckpointError: the ledger does not hold all steps up to ``step``.
            RunDirError: the disk is full or read-only.
        """
        self.commit()
        self.check_holds(step)
        self._execute(
            "UPDATE rollouts SET state = 'waiting', reason = ?, version_first = NULL, version_last = NULL, "
            "trained_step = NULL, failed_step = NULL, num_tokens = NULL, spans = NULL "
            "WHERE state IN ('dispatched', 'sampled', 'scored') OR trained_step > ? OR failed_step >= ?",
            (f"resumed from step {step}", step, step),
        )
        self.commit(durable=True)
        try:
            rows = self._db.execute(
                "SELECT rollout_id, epoch, prompt_index, sample_index FROM rollouts WHERE state = 'waiting' "
                "ORDER BY rollout_id"
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
        self._load()
        log.info("ledger.rewound", step=step, num_waiting=len(rows), next_ticket=self._next_ticket)
        return [Occurrence(rollout_id=a, epoch=b, prompt_index=c, sample_index=d) for a, b, c, d in rows]

    def verify(self, steps: int, rollouts_per_step: int, *, max_staleness: int | None = None) -> list[str]:
        """What speaks against "steps 1 … ``steps`` trained every occurrence exactly once"; empty when nothing does."""
        self._usable()
        return _problems(self._db, steps, rollouts_per_step, max_staleness)

    # Inside.

    def _check(self, event: str, rollout_id: int) -> None:
        if self._live.get(rollout_id) not in _BEFORE[event]:
            self._refuse(event, rollout_id)

    def _refuse(self, event: str, rollout_id: int) -> NoReturn:
        raise RuntimeError(
            f"rollout {rollout_id} cannot be {event!r}: the ledger has {self._row(rollout_id)}, "
            f"and that follows only {', '.join(_BEFORE[event])}"
        )

    def _row(self, rollout_id: int) -> str:
        """One row in words, for an error."""
        row = self._execute(
            "SELECT state, epoch, prompt_index, sample_index, trained_step, reason FROM rollouts WHERE rollout_id = ?",
            (rollout_id,),
        ).fetchone()
        if row is None:
            return "no such row"
        state, epoch, prompt_index, sample_index, trained_step, reason = row
        when = f" in step {trained_step}" if trained_step is not None else ""
        why = f" ({reason})" if reason else ""
        return f"state {state!r}{when}{why} for epoch {epoch}, prompt {prompt_index}, sample {sample_index}"

    def _move(self, rollout_id: int, state: State) -> None:
        self._counts[self._live[rollout_id]] -= 1
        self._counts[state] += 1
        self._live[rollout_id] = state

    def _end(self, rollout_id: int, state: State) -> None:
        self._counts[self._live.pop(rollout_id)] -= 1
        self._counts[state] += 1

    def _usable(self) -> None:
        if self._closed:
            raise RuntimeError(f"the ledger {self._path} is closed")
        if self._failure is not None:
            self._give_up(self._failure)

    def _execute(self, sql: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        if self._closed or self._failure is not None:
            self._usable()
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            return self._db.execute(sql, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> NoReturn:
        """SQLite may have undone the transaction: what is in memory is no longer what is in the file."""
        self._failure = error
        _translate(self._path, error)

    def _load(self) -> None:
        try:
            self._counts = dict.fromkeys(STATES, 0)
            for state, number in self._db.execute("SELECT state, count(*) FROM rollouts GROUP BY state"):
                self._counts[cast(State, sys.intern(state))] = number
            self._live = {
                rollout_id: cast(State, sys.intern(state))
                for rollout_id, state in self._db.execute(
                    "SELECT rollout_id, state FROM rollouts WHERE state NOT IN ('trained', 'failed')"
                )
            }
            last, steps = self._db.execute("SELECT max(rollout_id), max(trained_step) FROM rollouts").fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
        self._next_ticket = 0 if last is None else last + 1
        self._steps_done = steps or 0

    def _release(self) -> None:
        self._closed = True
        try:
            self._db.close()  # an open transaction is undone
        finally:
            if self._lock is not None:
                # Only a courtesy to who reads the file; the lock goes with the descriptor.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._lock, 0)
                os.close(self._lock)


def verify_ledger(path: Path, *, steps: int, rollouts_per_step: int, max_staleness: int | None = None) -> list[str]:
    """``Ledger.verify`` for a run that may be going on elsewhere or be over: opens the file for reading only.

    Raises:
        CheckpointError: there is no ledger at ``path``, or it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no ledger here; name the ledger.sqlite of a run")
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        try:
            return _problems(db, steps, rollouts_per_step, max_staleness)
        except sqlite3.Error as error:
            raise CheckpointError(f"{path}: cannot be read as a ledger ({error})") from error


def _problems(db: sqlite3.Connection, steps: int, rollouts_per_step: int, max_staleness: int | None) -> list[str]:
    def rows(sql: str, *values: object) -> Iterable[tuple[object, ...]]:
        return db.execute(sql, values).fetchall()

    trained = dict(
        db.execute("SELECT trained_step, count(*) FROM rollouts WHERE trained_step IS NOT NULL GROUP BY 1").fetchall()
    )
    problems = [
        f"step {step} trained {trained.get(step, 0)} rollouts, expected {rollouts_per_step}"
        for step in range(1, steps + 1)
        if trained.get(step, 0) != rollouts_per_step
    ]
    problems += [
        f"step {step} is recorded, but only {steps} steps were expected" for step in sorted(trained) if step > steps
    ]
    problems += [
        f"epoch {epoch}, prompt {prompt_index}, sample {sample_index} has {number} rows"
        for epoch, prompt_index, sample_index, number in rows(
            "SELECT epoch, prompt_index, sample_index, count(*) FROM rollouts GROUP BY 1, 2, 3 HAVING count(*) > 1"
        )
    ]
    problems += [
        f"rollout {rollout_id} is {state!r} with trained_step {trained_step} and failed_step {failed_step}"
        for rollout_id, state, trained_step, failed_step in rows(
            "SELECT rollout_id, state, trained_step, failed_step FROM rollouts "
            "WHERE (state = 'trained') <> (trained_step IS NOT NULL) OR (state = 'failed') <> (failed_step IS NOT NULL)"
        )
    ]
    problems += [
        f"rollout {rollout_id} was trained in step {trained_step} without a record of its answer"
        for rollout_id, trained_step in rows(
            "SELECT rollout_id, trained_step FROM rollouts WHERE state = 'trained' "
            "AND (num_tokens IS NULL OR num_tokens < 1 OR version_first IS NULL OR version_last < version_first)"
        )
    ]
    ((first, last, number),) = rows("SELECT min(rollout_id), max(rollout_id), count(*) FROM rollouts")
    if number and (first != 0 or last != cast(int, number) - 1):
        problems.append(f"tickets {first} … {last} have {number} rows: some are missing")
    if max_staleness is not None:
        problems += [
            f"rollout {rollout_id}, begun under version {version}, was trained in step {trained_step}: "
            f"{cast(int, trained_step) - 1 - cast(int, version)} versions late, the bound is {max_staleness}"
            for rollout_id, version, trained_step in rows(
                "SELECT rollout_id, version_first, trained_step FROM rollouts "
                "WHERE state = 'trained' AND trained_step - 1 - version_first NOT BETWEEN 0 AND ?",
                max_staleness,
            )
        ]
    return problems


def _take_lock(path: Path) -> int:
    """Hold ``path`` exclusively; the kernel gives it back when this process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirError(
            f"{path}: cannot be written ({error.strerror}); choose a folder that can be written with --out"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise RunDirError(
            f"{path.parent} is in use by process {owner}; wait for it to end, stop it, or choose another --out"
        ) from error
    except OSError as error:
        os.close(lock)
        raise RunDirError(f"{path}: cannot be locked ({error.strerror}); use a local file system") from error
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(lock)
        raise RunDirError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
    return lock


def _connect(path: Path, expected: Mapping[str, str]) -> sqlite3.Connection:
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}").fetchall()
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            db.execute("BEGIN IMMEDIATE")
            for statement in _CREATE:
                db.execute(statement)
            db.executemany("INSERT INTO meta VALUES (?, ?)", expected.items())
            db.execute("COMMIT")
        elif not {"meta", "rollouts"} <= tables:
            raise CheckpointError(f"{path}: is a database, but not a ledger; move it away or choose another --out")
        else:
            _check_identity(path, dict(db.execute("SELECT key, value FROM meta").fetchall()), expected)
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        _translate(path, error)
    except BaseException:
        if db is not None:
            db.close()
        raise
    return db


def _check_identity(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    if found.get("schema") != expected["schema"]:
        raise CheckpointError(
            f"{path}: has schema {found.get('schema')!r}, this program writes {expected['schema']!r}; "
            "resume with the version that began the run, or start a new one in another folder"
        )
    for key, value in expected.items():
        if found.get(key) != value:
            raise RunDirError(
                f"{path}: belongs to another run: {key} is {found.get(key)!r} there and {value!r} here; "
                "choose another folder with --out, or resume with the recipe that the run began with"
            )


def _translate(path: Path, error: sqlite3.Error) -> NoReturn:
    """SQLite's words into ours; what is neither the disk's fault nor the file's goes up as it is."""
    if isinstance(error, sqlite3.OperationalError):
        raise RunDirError(
            f"{path}: the ledger cannot be written ({error}); free some space or make the folder writable, then resume"
        ) from error
    if type(error) is sqlite3.DatabaseError:  # SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own
        raise CheckpointError(
            f"{path}: the ledger is damaged ({error}); restore it from a copy, or start a new run in another folder"
        ) from error
    raise error
