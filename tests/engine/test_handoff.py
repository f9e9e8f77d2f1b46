"""Handing tensors over: nothing on CPU, order and memory on CUDA."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.transport.handoff import (
    ALIGNMENT,
    HostArray,
    StagingRing,
    Uploader,
    consume,
    lay_out,
    pack,
    publish,
    record,
    unpack,
    use_own_stream,
)


def every_kind_of_array() -> list[HostArray]:
    read_only = np.arange(5, dtype=np.float32)
    read_only.flags.writeable = False
    return [
        np.arange(12, dtype=np.int32).reshape(3, 4),
        read_only,
        np.arange(6, dtype=np.float16)[::-2],
        np.arange(4, dtype=">i8"),
        np.zeros((0, 7), dtype=np.float32),
        np.array(2.5),
        np.array([True, False, True]),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.tensor(7),
    ]


def assert_same(tensors: tuple[Tensor, ...] | list[Tensor], arrays: list[HostArray]) -> None:
    for tensor, array in zip(tensors, arrays, strict=True):
        if isinstance(array, Tensor):
            assert tensor.dtype == array.dtype
            assert torch.equal(tensor.cpu(), array)
        else:
            assert tensor.cpu().numpy().dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def test_on_cpu_there_is_no_moment_to_wait_for() -> None:
    assert record(torch.device("cpu")) is None


def test_on_cpu_a_handoff_passes_the_same_tensors_on() -> None:
    x, y = torch.ones(3), torch.zeros(2)
    ticket = publish([x, y])

    assert ticket.event is None
    assert all(given is taken for given, taken in zip((x, y), consume(ticket), strict=True))


@pytest.mark.parametrize(
    ("tensors", "devices"), [([], "none"), ([torch.ones(1), torch.ones(1, device="meta")], "cpu, meta")]
)
def test_a_handoff_is_of_one_device(tensors: list[Tensor], devices: str) -> None:
    with pytest.raises(ValueError, match=rf"^a handoff takes tensors of one device, got {devices}; publish one ticket"):
        publish(tensors)


def test_on_cpu_an_upload_shares_the_memory_of_what_may_be_written() -> None:
    array, tensor = np.zeros(3, dtype=np.float32), torch.zeros(2)
    shared, same = consume(Uploader("cpu").upload([array, tensor]))
    array[1] = 5

    assert shared.tolist() == [0, 5, 0]
    assert same is tensor


def test_on_cpu_an_upload_takes_every_kind_of_array_without_a_warning() -> None:
    arrays = every_kind_of_array()

    assert_same(consume(Uploader("cpu").upload(arrays)), arrays)


def test_an_upload_refuses_what_it_cannot_carry() -> None:
    uploader = Uploader("cpu")
    with pytest.raises(ValueError, match=r"^an upload needs at least one array, got none$"):
        uploader.upload([])
    with pytest.raises(ValueError, match=r"^an upload takes arrays in host memory, got a tensor on meta; publish"):
        uploader.upload([torch.ones(1, device="meta")])
    with pytest.raises(TypeError, match="str_"):
        uploader.upload([np.array(["text"])])
    with pytest.raises(TypeError, match="str_"):
        lay_out([np.array(["text"])])


def test_what_is_packed_is_unpacked_with_shapes_and_dtypes_and_aligned() -> None:
    arrays = every_kind_of_array()
    layout = lay_out(arrays)
    buffer = torch.full((layout.num_bytes + 100,), 255, dtype=torch.uint8)
    pack(arrays, layout, buffer)

    assert_same(unpack(buffer.clone(), layout), arrays)
    assert all(place.start % ALIGNMENT == 0 for place in layout.places)
    assert layout.num_bytes == 8 * ALIGNMENT  # nine arrays, one of them empty


class Guard:
    def __init__(self, number: int, journal: list[str]) -> None:
        self.number = number
        self.journal = journal

    def synchronize(self) -> None:
        self.journal.append(f"wait {self.number}")


def make_ring(journal: list[str], *, num_buffers: int = 2) -> StagingRing[Guard]:
    def allocate(num_bytes: int) -> Tensor:
        journal.append(f"allocate {num_bytes}")
        return torch.empty(num_bytes, dtype=torch.uint8)

    return StagingRing(num_buffers, allocate=allocate)


def test_a_staging_buffer_is_used_again_only_after_the_device_has_read_it() -> None:
    journal: list[str] = []
    ring = make_ring(journal)
    taken = []
    for number in range(4):
        buffer, slot = ring.take(100)
        taken.append(buffer.data_ptr())
        journal.append(f"fill {number}")
        ring.give_back(slot, Guard(number, journal))

    assert journal == ["allocate 100", "fill 0", "allocate 100", "fill 1", "wait 0", "fill 2", "wait 1", "fill 3"]
    assert taken[:2] == taken[2:]


def test_a_staging_buffer_that_is_too_small_at_least_doubles() -> None:
    journal: list[str] = []
    ring = make_ring(journal, num_buffers=1)
    for size in (100, 110, 150, 1_000):
        assert ring.take(size)[0].numel() >= size

    assert journal == ["allocate 100", "allocate 200", "allocate 1000"]


def test_a_ring_without_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_buffers must be >= 1, got 0$"):
        Uploader("cpu", num_buffers=0)


# --- on a GPU: torch and pytest are all that these need --------------------------------------------------------------

A_WHILE = 200_000_000
"""Cycles: about 0.1 s on a device, and for ever beside the microseconds that a launch takes."""


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def keep_busy(cycles: int = A_WHILE) -> None:
    """Occupy the current stream."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


@pytest.mark.gpu
def test_a_consumer_sees_what_a_slow_producer_wrote_and_would_not_without_the_event() -> None:
    producer, careless, consumer = new_stream(), new_stream(), new_stream()
    x = torch.zeros(1_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        keep_busy()
        x.fill_(1)
        ticket = publish([x])
    with torch.cuda.stream(careless):
        unordered = x.clone()
    with torch.cuda.stream(consumer):
        [taken] = consume(ticket)
        ordered = taken.clone()
    torch.cuda.synchronize()

    assert unordered.sum().item() == 0, "the producer was not slow enough to prove anything"
    assert ordered.sum().item() == 1_000_000


@pytest.mark.gpu
def test_the_streams_may_be_named_instead_of_being_current() -> None:
    producer, consumer = new_stream(), new_stream()
    x = torch.zeros(1_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        keep_busy()
        x.fill_(1)
    [taken] = consume(publish([x], producer), consumer)
    with torch.cuda.stream(consumer):
        ordered = taken.clone()
    torch.cuda.synchronize()

    assert ordered.sum().item() == 1_000


@pytest.mark.gpu
@pytest.mark.parametrize("is_careful", [True, False])
def test_memory_is_not_reused_while_a_consumer_has_still_to_read_it(is_careful: bool) -> None:
    """With ``is_careful=False`` only the event is waited for: the allocator hands the block out again at once."""
    producer, consumer = new_stream(), new_stream()
    torch.cuda.empty_cache()
    with torch.cuda.stream(producer):
        x = torch.ones(1_000_000, device="cuda")
        ticket = publish([x])
    at = x.data_ptr()
    with torch.cuda.stream(consumer):
        if is_careful:
            [taken] = consume(ticket)
        else:
            assert ticket.event is not None
            consumer.wait_event(ticket.event)
            [taken] = ticket.tensors
        keep_busy()
        read = taken.clone()
    del x, ticket, taken
    with torch.cuda.stream(producer):
        newcomer = torch.full((1_000_000,), 2.0, device="cuda")
    torch.cuda.synchronize()

    assert (newcomer.data_ptr() != at) is is_careful
    assert (read.sum().item() == 1_000_000) is is_careful


@pytest.mark.gpu
def test_a_lent_buffer_is_written_again_only_after_it_was_read() -> None:
    producer, consumer = new_stream(), new_stream()
    with torch.cuda.stream(producer):
        buffer = torch.ones(1_000_000, device="cuda")
        lent = publish([buffer])
    with torch.cuda.stream(consumer):
        [taken] = consume(lent)
        keep_busy()
        read = taken.clone()
        returned = publish([taken])
    with torch.cuda.stream(producer):
        [buffer] = consume(returned)
        buffer.fill_(2)
    torch.cuda.synchronize()

    assert read.sum().item() == 1_000_000


@pytest.mark.gpu
def test_a_thread_with_a_stream_of_its_own_waits_for_what_it_launched_before() -> None:
    found: list[float] = []

    def work() -> None:
        keep_busy()
        written = torch.ones(1_000_000, device="cuda")
        before = torch.cuda.current_stream()
        use_own_stream(torch.device("cuda"))
        assert torch.cuda.current_stream() != before
        found.append(written.sum().item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert found == [1_000_000]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_on_cpu_there_is_no_stream_to_have() -> None:
    use_own_stream(torch.device("cpu"))


@pytest.mark.gpu
def test_an_upload_carries_every_kind_of_array() -> None:
    arrays = every_kind_of_array()
    tensors = consume(Uploader("cuda").upload(arrays))

    assert all(tensor.is_cuda for tensor in tensors)
    assert_same(tensors, arrays)


@pytest.mark.gpu
def test_many_uploads_in_flight_keep_what_they_carried_though_the_arrays_change() -> None:
    uploader, consumer = Uploader("cuda"), new_stream()
    array = np.empty(300_000, dtype=np.float32)
    copies: list[Tensor] = []
    with torch.cuda.stream(consumer):
        for number in range(12):
            source = array[: 25_000 * (number + 1)]  # grows, so the staging buffers are replaced on the way
            source.fill(number)
            keep_busy(A_WHILE // 20)
            [taken] = consume(uploader.upload([source]))
            copies.append(taken.clone())
            del taken
            array.fill(-1)
    torch.cuda.synchronize()

    for number, copy in enumerate(copies):
        assert copy.numel() == 25_000 * (number + 1)
        assert torch.all(copy == number)


@pytest.mark.gpu
def test_uploads_run_beside_the_kernels_of_the_consumer() -> None:
    uploader, consumer = Uploader("cuda"), new_stream()
    uploader.upload([np.zeros(1_000, dtype=np.float32)])  # allocates the staging buffer, which may stall the device
    uploader.upload([np.zeros(1_000, dtype=np.float32)])
    torch.cuda.synchronize()
    with torch.cuda.stream(consumer):
        keep_busy()
        ticket = uploader.upload([np.ones(1_000, dtype=np.float32)])
        assert ticket.event is not None
        ticket.event.synchronize()
        assert not consumer.query()  # the upload has landed, the kernel still runs
        [taken] = consume(ticket)
    torch.cuda.synchronize()

    assert taken.sum().item() == 1_000


@pytest.mark.gpu
def test_a_device_tensor_is_published_not_uploaded() -> None:
    with pytest.raises(ValueError, match="got a tensor on cuda:0; publish it instead"):
        Uploader("cuda").upload([torch.ones(1, device="cuda")])
