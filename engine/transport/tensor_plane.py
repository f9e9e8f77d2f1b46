"""Weights from one process to many, on any machine: a broadcast over gloo (host memory) or NCCL (GPUs).

    sender    fill buffer 0 | broadcast 0 ───────────▶| broadcast 1 ──…
                            | fill buffer 1           | fill buffer 0
    receiver                  receive 0 | hand out 0  | hand out 1
                                        | receive 1   | receive 0

Rank 0 sends, ranks 1 to N receive; nobody else's process group is touched, so a process may belong to a plane and to
any other group. They meet at a store that the sender opens, on the address that it is given and no other; what lies in
each bucket travels through that store, its bytes through the group. Nothing is unpickled. There is no password: whoever
reaches the port can join, so it belongs into the network that the GPUs talk in.

When versions are sent, and what is done with them, is decided elsewhere. Both ends must be told by other means that a
version is coming: ``receive`` waits for the first bucket no longer than ``timeout_s``.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import TensorPlaneError
from engine.generation.protocol import Bucket
from engine.generation.staging import written
from engine.transport.flat import Layout, lay_out, spec_of, views
from engine.transport.handoff import record, use_own_stream

Backend = Literal["gloo", "nccl"]

_SENDER = 0
_NUM_BUFFERS = 2
_GROWTH = 1 << 20
"""Buffers are asked for in multiples of this, so that a slightly larger bucket does not need a new one."""

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Layout | None)


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sender waits for its receivers; plain values, to be sent to them."""

    host: str
    port: int
    num_receivers: int
    backend: Backend
    timeout_s: float


class _Plane:
    """What sender and receivers have in common: store, group, two buffers."""

    def __init__(self, *, rank: int, meeting: Meeting, store: Any, address: str, device: torch.device) -> None:
        if (meeting.backend == "nccl") != (device.type == "cuda"):
            raise ValueError(f"{meeting.backend} cannot carry tensors on {device}; gloo takes the CPU's, nccl a GPU's")
        self.meeting = meeting
        self.device = device
        self._rank = rank
        self._store: Any = store
        self._address = address
        self._group: Any = None
        self._buffers: list[Tensor | None] = [None] * _NUM_BUFFERS
        self._version = 0
        """Versions that went through."""

    def _join(self) -> None:
        num_ranks = self.meeting.num_receivers + 1
        timeout = timedelta(seconds=self.meeting.timeout_s)
        with self._translated("could not meet the others"):
            if self.meeting.backend == "nccl":
                torch.cuda.set_device(self.device)
                options: Any = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(self._store, self._rank, num_ranks, options)
            else:
                options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                # Not the device of the host's name, which on many machines is one that no other machine reaches.
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
                options._timeout = timeout
                self._group = dist.ProcessGroupGloo(self._store, self._rank, num_ranks, options)

    def close(self) -> None:
        """Leave. Whoever waits for this rank gets an error. Idempotent."""
        group, self._group, self._store = self._group, None, None
        self._buffers = [None] * _NUM_BUFFERS
        if group is not None:
            group.abort()

    def _buffer(self, place: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8: buffer ``place``, of which nobody reads any more."""
        buffer = self._buffers[place]
        if buffer is None or len(buffer) < num_bytes:
            buffer = torch.empty(-(-num_bytes // _GROWTH) * _GROWTH, dtype=torch.uint8, device=self.device)
            self._buffers[place] = buffer
        return buffer[:num_bytes]

    def _meet(self) -> None:
        """Return when all ranks are here. Through the group, not the store: it notices at once who is gone."""
        _wait(self._group.allreduce(torch.zeros(1, device=self.device)))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _key(self, number: int) -> str:
        return f"weights/{self._version}/{number}"

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """From here on a failure of the network is the end of this rank's part in the plane."""
        if self._store is None:
            raise TensorPlaneError(f"{self!r} is closed; form a new group")
        try:
            yield
        except BaseException as error:
            text = repr(self)
            self.close()
            # torch has several kinds for a peer that is gone and for a time that is over, all of them RuntimeErrors.
            if isinstance(error, RuntimeError):
                raise TensorPlaneError(f"{text} {what}: {error}") from error
            raise

    def __repr__(self) -> str:
        meeting = self.meeting
        who = "sender" if self._rank == _SENDER else f"receiver {self._rank} of {meeting.num_receivers}"
        return f"<{meeting.backend} {who} at {meeting.host}:{meeting.port}, {self._version} versions>"


class WeightSender(_Plane):
    """Opens the store; ``meeting`` is what receivers need to know. Then ``join``, then any number of ``send``.

    Args:
        host: address of this machine that receivers reach, by name or number; the store listens there.
        device: where buckets are gathered for the broadcast: CPU for gloo, a GPU for NCCL.
        timeout_s: how long anything may wait for a peer.
        port: 0: any that is free.

    Raises:
        TensorPlaneError: the address cannot be listened on.
    """

    def __init__(
        self,
        *,
        host: str,
        num_receivers: int,
        device: torch.device,
        backend: Backend = "gloo",
        timeout_s: float = 300.0,
        port: int = 0,
    ) -> None:
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise TensorPlaneError(f"cannot wait for receivers at {host}:{port}: {error}") from error
        address, port = listener.getsockname()[:2]
        # The store owns the socket from here on. By itself it would listen on every address of the machine.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        meeting = Meeting(host=host, port=port, num_receivers=num_receivers, backend=backend, timeout_s=timeout_s)
        super().__init__(rank=_SENDER, meeting=meeting, store=store, address=address, device=device)

    def join(self) -> None:
        """Return when all receivers are there.

        Raises:
            TensorPlaneError: one did not come in time.
        """
        self._join()

    def send(self, buckets: Iterable[Bucket]) -> None:
        """Return when every receiver has handed out the whole version, and asked for more.

        Buckets are copied, so the iterator may reuse its memory: while one travels the next is asked for.

        Raises:
            TensorPlaneError: a receiver is gone or does not answer. The plane is closed; form a new one.
        """
        assert self._group is not None or self._store is None, "call join first"
        with self._translated("could not send a version"):
            works: list[Any] = [None] * _NUM_BUFFERS
            num_buckets = 0
            for bucket in buckets:
                place = num_buckets % _NUM_BUFFERS
                _wait(works[place])
                works[place] = self._start(num_buckets, bucket)
                num_buckets += 1
            self._store.set(self._key(num_buckets), _encode(None))
            self._meet()
            for number in range(num_buckets + 1):
                self._store.delete_key(self._key(number))
            self._version += 1

    def _start(self, number: int, bucket: Bucket) -> Any:
        layout = lay_out(map(spec_of, bucket.names, bucket.tensors))
        flat = self._buffer(number % _NUM_BUFFERS, layout.num_bytes)
        for view, tensor in zip(views(flat, layout), written(bucket), strict=True):
            view.copy_(tensor.detach())
        self._store.set(self._key(number), _encode(layout))
        if self.device.type == "cuda":
            # The bucket's memory is the caller's again as soon as the next one is asked for.
            torch.cuda.current_stream(self.device).synchronize()
        return self._group.broadcast(flat, _SENDER)


class WeightReceiver(_Plane):
    """Joins at once: blocks until the sender and all other receivers are there.

    Args:
        rank: 1 to ``meeting.num_receivers``, another for each.
        device: where buckets arrive: CPU for gloo, a GPU for NCCL.

    Raises:
        TensorPlaneError: the sender cannot be reached, or somebody did not come in time.
    """

    def __init__(self, meeting: Meeting, *, rank: int, device: torch.device) -> None:
        if not 1 <= rank <= meeting.num_receivers:
            raise ValueError(f"a receiver's rank is 1 to {meeting.num_receivers}, got {rank}")
        timeout = timedelta(seconds=meeting.timeout_s)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                meeting.host, meeting.port, is_master=False, wait_for_workers=False, timeout=timeout
            )
            with socket.create_connection((meeting.host, meeting.port), timeout=meeting.timeout_s) as probe:
                address = probe.getsockname()[0]
        except (RuntimeError, OSError) as error:
            raise TensorPlaneError(f"no sender of weights at {meeting.host}:{meeting.port}: {error}") from error
        super().__init__(rank=rank, meeting=meeting, store=store, address=address, device=device)
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="weights", initializer=use_own_stream, initargs=(device,)
        )
        self._join()

    def receive(self) -> Iterator[Bucket]:
        """The buckets of one version, as they were sent; the next one arrives while this one is looked at.

        To leave the iterator before its end is to leave the plane: the sender gets an error.

        Raises:
            TensorPlaneError: the sender is gone or does not send. The plane is closed.
        """
        number = 0
        with self._translated("could not receive a version"):
            coming = self._thread.submit(self._take, number)
            while (bucket := coming.result()) is not None:
                number += 1
                coming = self._thread.submit(self._take, number)
                yield bucket
            self._meet()
            self._version += 1

    def close(self) -> None:
        super().close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, number: int) -> Bucket | None:
        store, group = self._store, self._group
        layout = _decoder.decode(store.get(self._key(number)))
        if layout is None:
            return None
        flat = self._buffer(number % _NUM_BUFFERS, layout.num_bytes)
        _wait(group.broadcast(flat, _SENDER))
        return Bucket(
            names=tuple(spec.name for spec in layout.specs), tensors=views(flat, layout), written=record(self.device)
        )


def _wait(work: Any) -> None:
    """On CPU until it is done; on a GPU the calling thread's stream waits."""
    if work is not None:
        work.wait()
