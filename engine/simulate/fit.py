"""From the log of an earlier run to the costs and lengths of a simulation.

Every cost is a sum of a fixed part and parts per token or step. The parts are fitted to the durations in the log by
least squares under the condition that none is negative, and then scaled so that they add up to all the time that was
logged: what a run took in all is predicted best when nothing of it is left over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import RunDirError
from engine.monitor.log_files import LogFile, find_logs, merged
from engine.recipe import Recipe, ReplayConfig
from engine.run_dir import RunDir
from engine.simulate.lengths import Observed

_SAME_BATCH_S = 0.01
"""Scores that come together come one after the other through HTTP and the event loop: a millisecond each."""


_MAX_REQUESTS = 20_000
"""At the teacher, the latest: enough to see how it works."""


_NUM_DECODE_COSTS = 3
"""Of a step, of a slot in it, of a prompt token: fewer readings than that do not tell them apart."""


class _Line(msgspec.Struct, frozen=True):
    """The fields of a log line that say what something took."""

    event: str
    outcome: str = "ok"
    start_ns: int = 0
    dur_us: int = 0
    rollout_id: int = -1
    num_tokens: int | None = None
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    finish_reason: str = ""
    rollout_ids: list[int] = []
    running: int = 0
    tokens_total: int = 0
    decode_steps_total: int | None = None
    prefill_tokens_total: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0

    @property
    def start_s(self) -> float:
        return self.start_ns / 1e9

    @property
    def dur_s(self) -> float:
        return self.dur_us / 1e6


_FITTED = (
    "sampler.rollout",
    "generator.stats",
    "teacher.score",
    "learner.micro_batch",
    "learner.step",
    "weights.push",
    "eval.run",
    "checkpoint.save",
)


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    costs: ReplayConfig
    lengths: Observed


def fit(run: Path, recipe: Recipe) -> Fitted:
    """Costs and lengths of the run in the folder ``run``, for a simulation of ``recipe``. How many samplers, teachers
    and learners are simulated stays as the recipe says.

    Raises:
        RunDirError: no log there, or it holds too little to tell.
    """
    lines = _read(run)
    rollouts = {
        line.rollout_id: (line.num_prompt_tokens, line.num_tokens)
        for line in lines["sampler.rollout"]
        if line.num_tokens and line.rollout_id >= 0
    }
    ticks = _ticks(lines["generator.stats"])
    _check_enough(run, lines, rollouts, ticks)
    decode = _fit_decode(ticks)
    weights_pause_s = _pause_s(lines)
    recompute_s = decode["prefill_token_s"] * _recomputed_tokens(lines, rollouts)
    costs = msgspec.structs.replace(
        recipe.replay,
        **decode,
        **_fit_teacher(lines["teacher.score"], rollouts, num_replicas=_num_replicas(run)),
        **_fit_learner(lines["learner.micro_batch"], rollouts),
        optimizer_s=_mean_s(lines["learner.step"]),
        weights_pause_s=weights_pause_s,
        weights_push_s=max(0.0, _mean_s(lines["weights.push"]) - weights_pause_s - recompute_s),
        evaluation_s=_mean_s(lines["eval.run"]),
        checkpoint_s=_mean_s(lines["checkpoint.save"]),
    )
    pairs = [rollouts[ticket] for ticket in sorted(rollouts)]
    return Fitted(costs=costs, lengths=Observed(pairs, longest=recipe.sampler.max_new_tokens))


def _read(run: Path) -> dict[str, list[_Line]]:
    """The lines that are of use, by event; what was cancelled or failed or is not of their form is left out."""
    found: dict[str, list[_Line]] = {name: [] for name in _FITTED}
    for each in merged([LogFile(path) for path in find_logs(run)]):
        if each.event not in found:
            continue
        try:
            line = msgspec.convert(each.fields, _Line)
        except msgspec.ValidationError:
            continue
        if line.outcome == "ok":
            found[each.event].append(line)
    return found


def _check_enough(
    run: Path, lines: dict[str, list[_Line]], rollouts: dict[int, tuple[int, int]], ticks: Sequence[_Tick]
) -> None:
    wanted = {
        "finished answers (sampler.rollout)": bool(rollouts),
        "seconds of decoding (generator.stats)": bool(ticks),
        "scored answers (teacher.score)": bool(lines["teacher.score"]),
        "micro-batches (learner.micro_batch)": bool(lines["learner.micro_batch"]),
        "optimizer steps (learner.step)": bool(lines["learner.step"]),
    }
    missing = [name for name, is_there in wanted.items() if not is_there]
    if missing:
        raise RunDirError(
            f"{run}: its events.jsonl has no {', no '.join(missing)}, so nothing can be fitted to it; "
            "name a run that has done a few steps"
        )


class _Tick(msgspec.Struct, frozen=True):
    """What the generator did from one reading to the next."""

    steps: float
    tokens: float
    prefill_tokens: float
    busy_s: float
    """Pauses left out."""


def _from_to(readings: Sequence[_Line]) -> list[tuple[_Line, _Line]]:
    """Readings of the generator and those before them. A short run has a few, one a second: then what came before the
    first of each process, whose totals begin at 0, counts too, although it holds a warm-up."""
    pairs = list(itertools.pairwise(readings))
    if len(readings) > _NUM_DECODE_COSTS:
        return pairs
    start = _Line(event="generator.stats", decode_steps_total=0)
    return [
        (start if after.busy_s < before.busy_s else before, after)
        for before, after in itertools.pairwise([start, *readings])
    ]


def _ticks(readings: Sequence[_Line]) -> list[_Tick]:
    ticks = []
    for before, after in _from_to(readings):
        tokens = after.tokens_total - before.tokens_total
        busy_s = after.busy_s - before.busy_s - (after.paused_s - before.paused_s)
        if tokens <= 0 or busy_s <= 0:  # nothing was decoded, or the totals began anew with another process
            continue
        if after.decode_steps_total is not None and before.decode_steps_total is not None:
            steps = float(after.decode_steps_total - before.decode_steps_total)
        elif before.running and after.running:
            steps = tokens * 2.0 / (before.running + after.running)
        else:
            continue
        prefill_tokens = float(after.prefill_tokens_total - before.prefill_tokens_total)
        ticks.append(_Tick(steps, float(tokens), max(0.0, prefill_tokens), busy_s))
    return ticks


def _fit_decode(ticks: Sequence[_Tick]) -> dict[str, float]:
    columns = [[tick.steps for tick in ticks], [tick.tokens for tick in ticks], [tick.prefill_tokens for tick in ticks]]
    step_s, slot_s, prefill_token_s = non_negative_fit(columns, [tick.busy_s for tick in ticks])
    return {
        "decode_step_s": max(step_s, 1e-9),
        "decode_slot_s": slot_s,
        "prefill_s": 0.0,
        "prefill_token_s": prefill_token_s,
    }


def _pause_s(lines: dict[str, list[_Line]]) -> float:
    """Per version; 0 from a log that does not tell."""
    total = sum(max(0.0, after.paused_s - before.paused_s) for before, after in _from_to(lines["generator.stats"]))
    return total / len(lines["weights.push"]) if lines["weights.push"] else 0.0


def _recomputed_tokens(lines: dict[str, list[_Line]], rollouts: dict[int, tuple[int, int]]) -> float:
    """Per version: keys and values that were computed anew for it. A push lasts until they are."""
    readings = lines["generator.stats"]
    if not readings or not lines["weights.push"]:
        return 0.0
    prompts = sum(prompt for prompt, _ in rollouts.values())
    return max(0.0, readings[-1].prefill_tokens_total - prompts) / len(lines["weights.push"])


class _Batch(msgspec.Struct):
    """Rollouts whose scores came together."""

    arrived: float
    """When the last of them was asked for."""
    end: float
    num_tokens: int
    size: int


def _fit_teacher(
    spans: Sequence[_Line], rollouts: dict[int, tuple[int, int]], *, num_replicas: int
) -> dict[str, float | int]:
    """Whether rollouts are scored together, and how many batches a replica works on side by side, is tried out: unless
    it is right, what a batch seems to have taken does not go with its tokens."""
    requests = [(line.start_s, line.start_s + line.dur_s, _length(line, rollouts)) for line in spans[-_MAX_REQUESTS:]]
    most = -(-_most_at_once(requests) // num_replicas)
    tried: list[tuple[float, int, int, list[float]]] = []
    for within_s in (-1.0, _SAME_BATCH_S):
        batches = sorted(_batches(requests, within_s=within_s), key=lambda batch: batch.arrived)
        for number in [n for n in (*range(1, 33), *range(40, 512, 8)) if n < most] + [most]:
            rows = _served(batches, num_servers=number * num_replicas)
            columns = [[1.0] * len(rows), [row.num_tokens for row in rows], [row.was_idle for row in rows]]
            parts = non_negative_fit(columns, [row.seconds for row in rows])
            tried.append((_error(rows, parts), number, max(batch.size for batch in batches), parts))
    # The first of those that explain it about equally well, which promises the least.
    bound = 1.25 * min(error for error, _, _, _ in tried) + 0.01
    number, size, parts = next((number, size, parts) for error, number, size, parts in tried if error <= bound)
    return {
        "teacher_batch_rollouts": size,
        "teacher_parallel": number,
        "teacher_batch_s": parts[0],
        "teacher_token_s": parts[1],
        "teacher_latency_s": parts[2],
    }


class _Served(msgspec.Struct, frozen=True):
    """What a batch took, if so many servers take the batches in the order of their arrival."""

    seconds: float
    num_tokens: float
    was_idle: float
    """1.0: it waited for no server, so the latency is part of ``seconds``. 0.0: it followed another one at once."""


def _served(batches: Sequence[_Batch], *, num_servers: int) -> list[_Served]:
    ends = sorted(batch.end for batch in batches)
    rows = []
    for i, batch in enumerate(batches):
        free_at = ends[i - num_servers] if i >= num_servers else float("-inf")
        # Not 0: with too few servers some batches seem to end before they begin, and that must count as an error.
        seconds = max(1e-6, batch.end - max(free_at, batch.arrived))
        rows.append(_Served(seconds, float(batch.num_tokens), float(free_at <= batch.arrived)))
    return rows


def _batches(requests: Iterable[tuple[float, float, int]], *, within_s: float) -> list[_Batch]:
    """Scores that came ``within_s`` of one another were made together (negative: none were)."""
    batches: list[_Batch] = []
    for start, end, num_tokens in sorted(requests, key=lambda request: request[1]):
        last = batches[-1] if batches else None
        # One that was asked for after the other was there is no part of its batch.
        if last is not None and end - last.end <= within_s and start < last.end - within_s:
            last.arrived = max(last.arrived, start)
            last.end = end
            last.num_tokens += num_tokens
            last.size += 1
        else:
            batches.append(_Batch(start, end, num_tokens, 1))
    return batches


def _most_at_once(requests: Iterable[tuple[float, float, int]]) -> int:
    changes = sorted(change for start, end, _ in requests for change in ((start, 1), (end, -1)))
    return max(itertools.accumulate(change for _, change in changes), default=1)


def _error(rows: Sequence[_Served], parts: Sequence[float]) -> float:
    """Mean relative error of fixed + token · tokens + latency · idle."""
    fixed, token_s, latency_s = parts
    errors = [
        abs(fixed + token_s * row.num_tokens + latency_s * row.was_idle - row.seconds) / row.seconds for row in rows
    ]
    return sum(errors) / len(errors)


def _fit_learner(spans: Sequence[_Line], rollouts: dict[int, tuple[int, int]]) -> dict[str, float]:
    lengths = []
    for line in spans:
        known = [sum(rollouts[ticket]) for ticket in line.rollout_ids if ticket in rollouts]
        whole = known and len(known) == len(line.rollout_ids)
        lengths.append(float(sum(known) if whole else line.num_computed_tokens))
    fixed, token_s = non_negative_fit([[1.0] * len(spans), lengths], [line.dur_s for line in spans])
    return {"micro_batch_s": fixed, "learner_token_s": token_s}


def non_negative_fit(columns: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """Factors ≥ 0, one per column, with the least squared error, scaled so that the fit adds up to the target.

    Few columns: every subset is solved, and the best one whose factors are not negative is taken.
    """
    y = np.asarray(target, dtype=np.float64)
    best: tuple[float, npt.NDArray[np.float64]] | None = None
    for count in range(1, len(columns) + 1):
        for subset in itertools.combinations(range(len(columns)), count):
            a = np.asarray([columns[i] for i in subset], dtype=np.float64).T
            if a.size == 0 or not a.any(axis=0).all():
                continue
            found, _, rank, _ = np.linalg.lstsq(a, y, rcond=None)
            if rank < count or (found < 0).any():
                continue
            error = float(((a @ found - y) ** 2).sum())
            if best is None or error < best[0] * (1 - 1e-9):
                factors = np.zeros(len(columns))
                factors[list(subset)] = found
                best = (error, factors)
    if best is None:
        return [0.0] * len(columns)
    factors = best[1]
    predicted = float((np.asarray(columns, dtype=np.float64).T @ factors).sum())
    return [float(factor) for factor in factors * (y.sum() / predicted if predicted > 0 else 1.0)]


def _length(line: _Line, rollouts: dict[int, tuple[int, int]]) -> int:
    """Prompt and answer."""
    found = rollouts.get(line.rollout_id)
    return sum(found) if found is not None else (line.num_tokens or 0)


def _mean_s(spans: Sequence[_Line]) -> float:
    return sum(line.dur_s for line in spans) / len(spans) if spans else 0.0


def _num_replicas(run: Path) -> int:
    """Of the teacher of that run. Read loosely: its recipe may have been written by another version."""
    try:
        recipe: Any = msgspec.json.decode(RunDir(run).recipe.read_bytes())
        simulated = recipe.get("replay", {}).get("num_teachers")
        return int(simulated or len(recipe["teacher"].get("urls", ())) or 1)
    except (OSError, msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
        return 1
