"""Weights cross process borders whole and in order, and nobody waits for a peer that is gone. Real processes, real
sockets."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import TensorPlaneError
from engine.generation.protocol import Bucket
from engine.generation.staging import written
from engine.transport.flat import lay_out, spec_of, views
from engine.transport.handoff import record
from engine.transport.manifest import WeightDigest
from engine.transport.tensor_plane import Meeting, WeightReceiver, WeightSender

CPU = torch.device("cpu")


def make_version(seed: int, *, num_buckets: int = 4) -> Iterator[Bucket]:
    """Of many shapes and dtypes, in memory that is used again as soon as the next bucket is asked for."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.empty(1 << 16)
    for number in range(num_buckets):
        memory.copy_(torch.randn(memory.shape, generator=generator))
        tensors = (
            memory[: 7 * (number + 1)].view(7, -1),
            memory[100:200].bfloat16(),
            memory[200:203].to(torch.int8),
            memory[1000 : 1000 + 5000 * number],
        )
        yield Bucket(names=tuple(f"{number}.{i}" for i in range(len(tensors))), tensors=tensors)
        memory.fill_(float("nan"))


def digest(buckets: Iterator[Bucket]) -> str:
    found = WeightDigest()
    for bucket in buckets:
        for name, tensor in zip(bucket.names, written(bucket), strict=True):
            found.add(name, tensor)
    return found.hexdigest()


def serve(pipe: Connection, meeting: Meeting, rank: int, device: str = "cpu") -> None:
    """A receiver: told "receive", answers with the digest of what came, or with the error's text."""
    torch.set_num_threads(1)
    receiver = WeightReceiver(meeting, rank=rank, device=torch.device(device))
    pipe.send("joined")
    while pipe.recv() == "receive":
        try:
            pipe.send(digest(receiver.receive()))
        except TensorPlaneError as error:
            pipe.send(f"error: {error}")
    receiver.close()


class Receivers:
    """Processes that have joined ``sender``."""

    def __init__(self, sender: WeightSender) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(1, sender.meeting.num_receivers + 1):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(theirs, sender.meeting, rank), daemon=True))
            self.processes[-1].start()
            theirs.close()
        sender.join()
        assert self.answers() == ["joined"] * len(self.pipes)

    def tell(self, word: str) -> None:
        for pipe in self.pipes:
            pipe.send(word)

    def answers(self) -> list[str]:
        return [pipe.recv() for pipe in self.pipes]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send("leave")
            pipe.close()
            process.join(20)
            process.kill()
            process.join()


def make_sender(num_receivers: int, *, timeout_s: float = 60.0) -> WeightSender:
    return WeightSender(host="127.0.0.1", num_receivers=num_receivers, device=CPU, timeout_s=timeout_s)


def test_every_receiver_gets_every_version_whole_and_in_order_until_one_is_killed() -> None:
    sender = make_sender(2)
    receivers = Receivers(sender)
    try:
        for seed, num_buckets in ((0, 4), (1, 1), (2, 0), (3, 5)):
            receivers.tell("receive")
            sender.send(make_version(seed, num_buckets=num_buckets))
            assert receivers.answers() == [digest(make_version(seed, num_buckets=num_buckets))] * 2

        receivers.pipes[0].send("receive")
        os.kill(receivers.processes[1].pid, signal.SIGKILL)
        with pytest.raises(TensorPlaneError, match=r"gloo sender at 127.0.0.1:\d+, 4 versions> could not send"):
            sender.send(make_version(4, num_buckets=50))
        assert receivers.pipes[0].recv().startswith("error: <gloo receiver 1 of 2")
        with pytest.raises(TensorPlaneError, match="form a new"):
            sender.send(make_version(5))
    finally:
        sender.close()
        receivers.stop()


def in_thread(receiver: WeightReceiver) -> list[tuple[str, Tensor]]:
    return [
        (name, t.clone()) for bucket in receiver.receive() for name, t in zip(bucket.names, bucket.tensors, strict=True)
    ]


def joined() -> tuple[WeightSender, WeightReceiver]:
    sender = make_sender(1)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(WeightReceiver, sender.meeting, rank=1, device=CPU)
        sender.join()
        return sender, joining.result()


@pytest.mark.gpu
def test_nccl_takes_a_version_from_a_stream_that_still_writes_it() -> None:
    device = torch.device("cuda", 0)
    sender = WeightSender(host="127.0.0.1", num_receivers=0, device=device, backend="nccl", timeout_s=60.0)
    sender.join()
    writing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(writing):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        tensor = torch.full((1 << 20,), 3.0, device=device)
        event = record(device)
    sender.send([Bucket(names=("w",), tensors=(tensor,), written=event)])

    (sent,) = views(sender._buffers[0], lay_out([spec_of("w", tensor)]))  # type: ignore[arg-type]
    assert bool((sent == 3.0).all())
    sender.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a device of its own for each rank")
def test_nccl_carries_versions_between_two_devices() -> None:
    sender = WeightSender(
        host="127.0.0.1", num_receivers=1, device=torch.device("cuda", 0), backend="nccl", timeout_s=60.0
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, sender.meeting, 1, "cuda:1"), daemon=True)
    process.start()
    try:
        sender.join()
        assert ours.recv() == "joined"
        for seed in range(3):
            ours.send("receive")
            sender.send(make_version(seed))
            assert ours.recv() == digest(make_version(seed))
    finally:
        sender.close()
        ours.close()
        process.join(20)
        process.kill()


def test_a_version_that_breaks_off_at_the_sender_ends_both_sides() -> None:
    sender, receiver = joined()

    def broken() -> Iterator[Bucket]:
        yield from make_version(0, num_buckets=2)
        raise ArithmeticError("the learner is gone")

    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(in_thread, receiver)
        with pytest.raises(ArithmeticError, match="the learner is gone"):
            sender.send(broken())
        with pytest.raises(TensorPlaneError, match="could not receive a version"):
            receiving.result()


def test_a_receiver_that_leaves_in_the_middle_is_an_error_at_the_sender() -> None:
    sender, receiver = joined()

    def leave() -> None:
        buckets = receiver.receive()
        next(buckets)
        del buckets

    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(leave)
        with pytest.raises(TensorPlaneError, match="could not send a version"):
            sender.send(make_version(0, num_buckets=20))
        leaving.result()


def test_a_sender_waits_no_longer_for_receivers_than_it_is_told() -> None:
    with pytest.raises(TensorPlaneError, match="could not meet the others"):
        make_sender(1, timeout_s=0.2).join()


def test_the_store_listens_on_the_given_address_alone() -> None:
    import socket

    sender = make_sender(1)
    with socket.socket() as other:
        other.bind(("127.0.0.2", sender.meeting.port))  # free, unless the store took every address
    sender.close()


def test_backend_and_device_belong_together() -> None:
    with pytest.raises(ValueError, match="nccl cannot carry tensors on cpu"):
        WeightSender(host="127.0.0.1", num_receivers=1, device=CPU, backend="nccl")
    with pytest.raises(ValueError, match="a receiver's rank is 1 to 1, got 0"):
        WeightReceiver(make_sender(1).meeting, rank=0, device=CPU)
