"""What is said of ranks that went wrong, and which of their errors are the caller's. Decides nothing else."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from engine.transport.rank_processes import RankProcess
from engine.transport.rank_protocol import TRAVELLING, Raised


def expected_error(rank: RankProcess, raised: Raised) -> Exception | None:
    """The error itself, with the rank's traceback as a note, when it is one of TRAVELLING."""
    for kind in TRAVELLING:
        if kind.__name__ == raised.kind:
            error = kind(raised.text)
            error.add_note(f"in rank {rank.rank}:\n{_indented(raised.traceback)}")
            return error
    return None


def of_error(rank: RankProcess, raised: Raised, *, what: str, num_ranks: int) -> str:
    return (
        f"rank {rank.rank} of {num_ranks} failed in {what}: {raised.kind}: {raised.text}; the other ranks were "
        f"stopped; its log is {rank.log}. In the rank:\n{_indented(raised.traceback)}"
    )


def of_death(rank: RankProcess, code: int, *, num_ranks: int) -> str:
    """``code`` as ``subprocess`` has it."""
    if code >= 0:
        how = f"ended by itself with exit code {code}"
    else:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        how = f"was killed by {signal.Signals(-code).name}{hint}"
    return (
        f"rank {rank.rank} of {num_ranks} {how}; the other ranks were stopped; the end of its log, "
        f"{rank.log}:{rank.log_tail()}"
    )


def of_silence(
    ranks: Sequence[RankProcess], *, are_stopped: bool, what: str, timeout_s: float, num_ranks: int, folder: Path
) -> str:
    """``ranks`` did not answer; the log of one that is not stopped ends with its stacks."""
    numbers = ", ".join(str(rank.rank) for rank in ranks)
    is_one = len(ranks) == 1
    state = "stopped by a signal (SIGSTOP?)" if are_stopped else "hanging, or slower than that"
    stacks = "" if are_stopped else f"; where, at the end of the log of rank {ranks[0].rank}:{ranks[0].log_tail()}"
    return (
        f"rank{'' if is_one else 's'} {numbers} of {num_ranks} did not answer {what} in {timeout_s:g} s and "
        f"{'is' if is_one else 'are'} {state}; all ranks were stopped; logs are in {folder}{stacks}"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
