"""A group of real processes with real collectives, and every way in which one of them can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import NonFiniteError, RanksLost
from engine.transport.rank_group import RankGroup
from tests.engine.transport.rank_objects import Batch, Counter, Settings

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 60.0
"""Longer than anything here takes on a busy machine; reaching it is a failure."""


def make_group(
    folder: Path, *, num_ranks: int = 2, factory: str = "make", call_timeout_s: float = PATIENCE_S
) -> RankGroup:
    return RankGroup(
        name="test",
        interface=Counter,
        factory=f"tests.engine.transport.rank_objects:{factory}",
        arguments={"settings": Settings(factor=2)},
        num_ranks=num_ranks,
        folder=folder,
        start_timeout_s=PATIENCE_S,
        call_timeout_s=call_timeout_s,
        environment={"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Of two ranks, which the tests that leave it whole share."""
    group = make_group(tmp_path_factory.mktemp("ranks"))
    group.start()
    yield group
    group.close()


@pytest.fixture
def own_group(tmp_path: Path) -> Iterator[RankGroup]:
    group = make_group(tmp_path, call_timeout_s=5.0)
    group.start()
    yield group
    group.close()


def batch(num: int, value: float = 1.0) -> Batch:
    return Batch(values=np.full(num, value, np.float32))


def assert_gone(pids: tuple[int, ...]) -> None:
    """Every process has ended and was waited for, or is about to vanish with its parent."""
    deadline = time.monotonic() + PATIENCE_S
    for pid in pids:
        while is_alive(pid):
            assert time.monotonic() < deadline, f"process {pid} was left behind"
            os.sched_yield()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in "ZX"
    except OSError:
        return False


def test_every_rank_gets_its_own_arguments_and_all_meet_inside_the_call(group: RankGroup) -> None:
    results = group.call("total", [{"batch": batch(3)}, {"batch": batch(5, 10.0)}])

    assert results == [106.0, 106.0], "(3·1 + 5·10)·2"


def test_an_array_that_several_ranks_read_is_written_once(group: RankGroup) -> None:
    big = np.ones(1 << 20, np.float32)
    group.call("total", [{"batch": Batch(values=big)}, {"batch": Batch(values=big)}])

    assert os.fstat(group._arrays.fileno()).st_size < 2 * big.nbytes


def test_arrays_keep_shape_and_dtype_when_they_are_empty_or_not_contiguous(group: RankGroup) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    empty = np.empty((0, 7), np.int32)

    assert group.call("shapes", {"batch": Batch(values=values, ids=empty)}) == [[[4, 3], [0, 7]]] * 2
    assert group.call("total", {"batch": Batch(values=values)}) == [264.0, 264.0]


@pytest.mark.parametrize("in_place", [True, False])
def test_tensors_come_back_bit_for_bit_and_the_next_ones_are_made_meanwhile(group: RankGroup, in_place: bool) -> None:
    kept: list[tuple[Sequence[str], list[torch.Tensor], list[torch.Tensor]]] = []
    for names, tensors in group.stream("pieces", num=5, size=64, in_place=in_place):
        assert all(
            tensor.data_ptr() not in {t.data_ptr() for _, old, _ in kept[-1:] for t in old} for tensor in tensors
        )
        kept.append((names, tensors, [tensor.clone() for tensor in tensors]))

    assert [names for names, _, _ in kept] == [[f"a{i}", f"b{i}"] for i in range(5)]
    for i, (_, _, (first, second)) in enumerate(kept):
        assert torch.equal(first, torch.full((64,), 2.0 * i))
        assert torch.equal(second, torch.full((2, 32), -i, dtype=torch.bfloat16))


def test_calls_go_on_while_an_iterator_is_open(group: RankGroup) -> None:
    items = group.stream("pieces", num=3, size=8, in_place=True)
    next(items)
    assert group.call("total", {"batch": batch(1)}) == [4.0, 4.0]

    assert [names[0] for names, _ in items] == ["a1", "a2"]


def test_an_iterator_closed_early_leaves_the_ranks_ready_for_the_next(group: RankGroup) -> None:
    items = group.stream("pieces", num=9, size=8, in_place=False)
    next(items)
    items.close()  # type: ignore[attr-defined]

    assert len(list(group.stream("pieces", num=2, size=8, in_place=False))) == 2


def test_an_iterator_that_somebody_still_holds_does_not_disturb_the_next(group: RankGroup) -> None:
    held = group.stream("pieces", num=9, size=8, in_place=False)
    next(held)

    assert [names[0] for names, _ in group.stream("pieces", num=2, size=8, in_place=False)] == ["a0", "a1"]
    assert list(held) == []


def test_an_expected_error_of_all_ranks_is_raised_as_itself_and_the_group_goes_on(group: RankGroup) -> None:
    with pytest.raises(NonFiniteError, match="as told, in rank 0") as caught:
        group.call("refuse", {"ranks": [0, 1], "kind": "NonFiniteError", "meet": True})

    assert "rank_objects.py" in caught.value.__notes__[0], "the rank's traceback comes with it"
    assert group.call("total", {"batch": batch(1)}) == [4.0, 4.0]


def test_an_expected_error_inside_an_iterator_is_raised_as_itself(group: RankGroup) -> None:
    items = group.stream("pieces", num=4, size=8, in_place=False, fail_at=2)
    next(items)
    next(items)
    with pytest.raises(NonFiniteError, match="item 2"):
        next(items)
    assert len(list(group.stream("pieces", num=2, size=8, in_place=False))) == 2


def test_many_calls_leave_no_files_and_no_memory_behind(group: RankGroup) -> None:
    def once(i: int) -> None:
        group.call("total", {"batch": batch(1000 + i)})
        for _ in group.stream("pieces", num=3, size=1 << 16, in_place=bool(i % 2)):
            pass

    for i in range(5):
        once(i)
    before, own = group.call("where", {}), len(os.listdir("/proc/self/fd"))
    for i in range(40):
        once(i)
    after = group.call("where", {})

    assert [files for _, _, files, _ in after] == [files for _, _, files, _ in before]
    assert len(os.listdir("/proc/self/fd")) == own
    for (_, _, _, then), (_, _, _, now) in zip(before, after, strict=True):
        assert now - then < 8 << 20, "120 items of 0.4 MiB would be more"


def test_ranks_listen_on_the_loopback_interface_alone(group: RankGroup) -> None:
    sockets = {
        os.readlink(entry)
        for pid in (os.getpid(), *group.pids)
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink()
    }
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in sockets
    ]

    assert listening, "the store listens"
    assert all(address.startswith("0100007F:") for address in listening), listening


@pytest.mark.parametrize("during_call", [True, False])
def test_a_killed_rank_is_named_and_its_peers_are_stopped(tmp_path: Path, during_call: bool) -> None:
    group = make_group(tmp_path, num_ranks=3)
    group.start()
    pids = group.pids
    try:
        if not during_call:
            os.kill(pids[1], signal.SIGKILL)
            assert_gone(pids)
        began = time.monotonic()
        with pytest.raises(RanksLost, match=r"rank 1 of 3 was killed by SIGKILL"):
            group.call("kill", {"rank": 1, "signal_number": signal.SIGKILL})
        assert time.monotonic() - began < 20.0
        assert_gone(pids)
        with pytest.raises(RanksLost, match="rank 1 of 3"):
            group.call("where", {})
    finally:
        group.close()


def test_a_rank_that_fails_alone_is_named_with_its_traceback_and_its_peer_does_not_wait(own_group: RankGroup) -> None:
    pids = own_group.pids
    with pytest.raises(RanksLost, match=r"(?s)rank 1 of 2 failed in refuse: KeyError.*rank_objects\.py"):
        own_group.call("refuse", {"ranks": [1], "kind": "KeyError", "meet": True})
    assert_gone(pids)


def test_a_stopped_rank_is_named_when_its_time_is_over(own_group: RankGroup) -> None:
    pids = own_group.pids
    with pytest.raises(RanksLost, match=r"rank 0 of 2 did not answer kill in 5 s and is stopped by a signal"):
        own_group.call("kill", {"rank": 0, "signal_number": signal.SIGSTOP})
    assert_gone(pids)


def test_a_hanging_rank_shows_where_it_hangs(own_group: RankGroup) -> None:
    pids = own_group.pids
    with pytest.raises(RanksLost, match=r"(?s)ranks 0, 1 of 2 did not answer hang in 2 s.*File .*rank_objects\.py"):
        own_group.call("hang", {"rank": 1, "in_c": True}, timeout_s=2.0)
    assert_gone(pids)


def test_a_factory_that_raises_in_one_rank_leaves_no_process(tmp_path: Path) -> None:
    group = make_group(tmp_path, factory="make_none")
    with pytest.raises(RanksLost, match=r"(?s)rank 1 of 2 failed in start: KeyError.*make_none"):
        group.start()
    assert "KeyError" in (tmp_path / "rank_001.log").read_text()


NODE = """
import sys
from pathlib import Path
from tests.engine.transport.test_rank_group import make_group

group = make_group(Path(sys.argv[1]))
group.start()
print("pids", *group.pids, flush=True)
group.call("hang", {"rank": 1, "in_c": False})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_killed_leaves_no_rank_behind(tmp_path: Path, how: signal.Signals) -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert node.stdout is not None
    told = next(line for line in node.stdout if line.startswith(b"pids"))
    pids = tuple(map(int, told.split()[1:]))
    for pid in pids[:1] if how is signal.SIGKILL else ():
        os.kill(pid, signal.SIGSTOP)  # cannot do anything itself
    for pid in pids if how is not signal.SIGKILL else ():
        os.kill(pid, how)  # a job's end reaches all of its processes; ranks leave it to the node
    assert all(is_alive(pid) for pid in pids)
    node.send_signal(how)
    node.communicate(timeout=PATIENCE_S)

    assert_gone(pids)
