"""The torch generator: the common contract on three architectures, and what only it promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import GeneratorDied, ModelError
from engine.generation.decoder import Decoder
from engine.generation.hf import HFGenerator
from engine.generation.protocol import Aborted, Bucket, Generation, Generator
from engine.recipe import SamplerConfig, StudentConfig, WeightsConfig
from tests.engine.generation.contract import (
    GeneratorContract,
    Subject,
    buckets_of,
    buckets_of_copies,
    check_against,
    mixed_requests,
    request,
)
from tests.support.clock import Settle
from tests.support.models import Arch, load, tiny_model

NUM_SLOTS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Per architecture the folder of version 0 and of version 1."""
    root = tmp_path_factory.mktemp("models")
    archs: tuple[Arch, ...] = ("llama", "qwen3", "gpt2")
    return {
        arch: [tiny_model(root / f"{arch}{seed}", arch=arch, seed=seed, tied=arch != "qwen3") for seed in (0, 1)]
        for arch in archs
    }


def make(folder: Path, *, num_slots: int = NUM_SLOTS, num_threads: int = 1, device: str = "cpu") -> HFGenerator:
    return HFGenerator(
        config=SamplerConfig(num_slots=num_slots, num_threads=num_threads, device=device),
        student=StudentConfig(path=str(folder)),
    )


@pytest.fixture
async def generator(folders: dict[str, list[Path]]) -> AsyncIterator[HFGenerator]:
    generator = make(folders["llama"][0])
    await generator.start()
    yield generator
    await generator.stop()


class TestHF(GeneratorContract):
    @pytest.fixture(params=["llama packed", "qwen3", "gpt2"])
    async def subject(
        self, request: pytest.FixtureRequest, folders: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Subject]:
        arch, _, packed = request.param.partition(" ")
        if packed:
            # These models are too small for it to pay; what is packed must keep the contract all the same.
            monkeypatch.setattr("engine.packed_linear._MIN_ELEMENTS", 0)
            monkeypatch.setattr("engine.packed_linear._NUM_PLAIN_BLOCKS", 0)
        started: list[HFGenerator] = []

        async def start() -> Generator:
            generator = make(folders[arch][0])
            started.append(generator)
            await generator.start()
            return generator

        yield Subject(
            start=start,
            num_slots=NUM_SLOTS,
            models=[load(folder) for folder in folders[arch]],
            tolerance=1e-5,
            max_positions=512,
        )
        for generator in started:
            await generator.stop()


@pytest.mark.gpu
class TestHFOnGpu(GeneratorContract):
    @pytest.fixture(params=["llama", "qwen3", "gpt2"])
    async def subject(self, request: pytest.FixtureRequest, folders: dict[str, list[Path]]) -> AsyncIterator[Subject]:
        started: list[HFGenerator] = []

        async def start() -> Generator:
            generator = make(folders[request.param][0], device="cuda")
            started.append(generator)
            await generator.start()
            return generator

        yield Subject(
            start=start,
            num_slots=NUM_SLOTS,
            models=[load(folder) for folder in folders[request.param]],
            tolerance=1e-5,
            max_positions=512,
        )
        for generator in started:
            await generator.stop()


class Gate:
    """Holds the decode thread before each step until it is told to go on."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self._is_open = False

    def allow(self, steps: int) -> None:
        self._steps.release(steps)

    def open(self) -> None:
        self._is_open = True
        self._steps.release()

    def wait(self) -> None:
        if not self._is_open:
            self._steps.acquire()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()

    class Gated(Decoder):
        def step(self) -> list[tuple[int, Generation]]:
            gate.wait()
            return super().step()

    monkeypatch.setattr("engine.generation.hf.Decoder", Gated)
    yield gate
    gate.open()


async def test_a_slot_is_refilled_at_the_step_after_it_fell_free(gate: Gate, folders: dict[str, list[Path]]) -> None:
    generator = make(folders["llama"][0], num_slots=2)
    await generator.start()
    begun: asyncio.Queue[int] = asyncio.Queue()
    asked = [request(i, max_new_tokens=n) for i, n in enumerate([50, 2, 3, 4])]
    tasks = [
        asyncio.create_task(generator.generate_wave([one], on_begin=lambda at, version: begun.put_nowait(at)))
        for one in asked
    ]
    assert [await begun.get() for _ in range(2)] == [0, 1]

    gate.allow(2)
    assert await begun.get() == 2
    gate.allow(3)
    assert await begun.get() == 3
    gate.open()
    await asyncio.gather(*tasks)

    # One long answer held nobody: 2 + 3 + 4 tokens went through the other slot in 9 steps, beside the first 9 of 50.
    assert generator.statistics().decode_steps_total == 50
    await generator.stop()


async def test_samples_of_a_live_prompt_share_its_prefill(generator: HFGenerator) -> None:
    prompt = list(range(3, 43))
    asked = [request(i, prompt=prompt, max_new_tokens=4 + i) for i in range(9)]

    answers = await generator.generate_wave(asked)

    assert generator.statistics().prefill_tokens_total == len(prompt) - 1
    assert len({answer.token_ids[:4] for answer in answers}) > 1


@pytest.mark.parametrize("num_threads", [1, 2])
async def test_a_wave_has_the_same_bits_in_two_generators(folders: dict[str, list[Path]], num_threads: int) -> None:
    results = []
    for _ in range(2):
        generator = make(folders["llama"][0], num_threads=num_threads)
        await generator.start()
        results.append(await generator.generate_wave(mixed_requests(11)))
        await generator.stop()

    assert results[0] == results[1]


async def test_an_update_in_flight_reads_the_buckets_in_another_thread(generator: HFGenerator) -> None:
    readers: list[str] = []
    folder_model = load(Path(generator._student.path))

    def buckets() -> Iterator[Bucket]:
        for bucket in buckets_of(folder_model):
            readers.append(threading.current_thread().name)
            yield bucket

    await generator.update_weights(5, buckets(), config=WeightsConfig())

    assert {name.split("_")[0] for name in readers} == {"weights"}
    assert generator.statistics().version == 5


async def test_a_cancelled_update_does_not_happen(gate: Gate, folders: dict[str, list[Path]], settle: Settle) -> None:
    generator = make(folders["llama"][0])
    await generator.start()
    old, new = (load(folder) for folder in folders["llama"])
    task = asyncio.create_task(generator.generate(request(0, max_new_tokens=6)))
    update = asyncio.create_task(generator.update_weights(1, buckets_of(new), config=WeightsConfig(mode="drain")))
    gate.allow(2)
    await settle()

    update.cancel()
    await settle()  # withdrawn before the last token: with the gate open first, the thread may be faster
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await update

    assert [span.version for span in (await task).spans] == [0]
    assert generator.statistics().version == 0
    await generator.update_weights(1, buckets_of(old), config=WeightsConfig())
    assert generator.statistics().version == 1
    await generator.stop()


async def test_an_update_under_way_ends_when_the_generator_stops(folders: dict[str, list[Path]]) -> None:
    generator = make(folders["llama"][0])
    await generator.start()
    is_reading, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[Bucket]:
        for bucket in buckets_of_copies(load(folders["llama"][1])):
            is_reading.set()
            go_on.wait()
            yield bucket

    update = asyncio.create_task(generator.update_weights(1, slow(), config=WeightsConfig()))
    await asyncio.to_thread(is_reading.wait)

    await generator.stop()
    go_on.set()

    with pytest.raises(GeneratorDied, match=r"stopped|not running"):
        await update


async def test_a_dead_decode_loop_fails_what_is_open_and_every_later_call(
    folders: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make(folders["llama"][0])
    await generator.start()

    def broken(self: Decoder) -> list[tuple[int, Generation]]:
        raise MemoryError("no room for a step")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", broken)
        outcomes = await asyncio.gather(*map(generator.generate, mixed_requests(9)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, GeneratorDied)
        assert isinstance(outcome.__cause__, MemoryError)
    with pytest.raises(GeneratorDied, match="MemoryError: no room for a step"):
        await generator.generate(request(0))
    with pytest.raises(GeneratorDied):
        await generator.update_weights(1, [], config=WeightsConfig())

    await generator.stop()
    await generator.start()
    assert len((await generator.generate(request(0))).token_ids) == 8
    await generator.stop()


async def test_weights_that_are_not_finite_kill_the_generator_with_that_reason(generator: HFGenerator) -> None:
    model = load(Path(generator._student.path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    await generator.update_weights(1, buckets_of(model), config=WeightsConfig())

    with pytest.raises(GeneratorDied, match="NaN or infinity"):
        await generator.generate(request(0))


async def test_it_starts_again_after_a_stop_with_the_weights_of_the_folder(
    generator: HFGenerator, folders: dict[str, list[Path]]
) -> None:
    first = await generator.generate(request(0))
    await generator.update_weights(3, buckets_of(load(folders["llama"][1])), config=WeightsConfig())
    await generator.stop()
    with pytest.raises(GeneratorDied, match=r"call start\(\) first"):
        await generator.generate(request(0))

    await generator.start()

    assert await generator.generate(request(0)) == first
    assert generator.statistics().version == 0
    with pytest.raises(RuntimeError, match="started already"):
        await generator.start()


async def test_stopping_gives_up_running_and_waiting_requests(gate: Gate, folders: dict[str, list[Path]]) -> None:
    generator = make(folders["llama"][0], num_slots=1)
    await generator.start()
    begun = asyncio.Event()
    running = asyncio.create_task(generator.generate(request(0), on_begin=lambda version: begun.set()))
    waiting = asyncio.create_task(generator.generate(request(1)))
    await begun.wait()

    stopping = asyncio.create_task(generator.stop())
    gate.open()
    await stopping

    for task in (running, waiting):
        with pytest.raises(Aborted):
            await task


async def test_an_id_may_come_again_at_once_after_it_was_cancelled(gate: Gate, folders: dict[str, list[Path]]) -> None:
    generator = make(folders["llama"][0])
    await generator.start()
    begun = asyncio.Event()
    first = asyncio.create_task(generator.generate(request(7, max_new_tokens=1), on_begin=lambda version: begun.set()))
    await begun.wait()

    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    again = asyncio.create_task(generator.generate(request(7, prompt=[9], max_new_tokens=5)))
    gate.open()

    assert len((await again).token_ids) == 5
    await generator.stop()


async def test_a_wave_that_is_cancelled_frees_all_its_slots(generator: HFGenerator) -> None:
    begun = asyncio.Event()
    wave = asyncio.create_task(
        generator.generate_wave(
            [request(i, max_new_tokens=400) for i in range(9)], on_begin=lambda request_id, version: begun.set()
        )
    )
    await begun.wait()

    wave.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wave

    assert len(await generator.generate_wave([request(i) for i in range(9)])) == 9
    assert generator.statistics().waiting == 0


async def test_a_wave_with_two_equal_ids_is_refused(generator: HFGenerator) -> None:
    with pytest.raises(ValueError, match="request 1 is open already"):
        await generator.generate_wave([request(1), request(1)])


async def test_a_folder_that_cannot_be_loaded_leaves_nothing_running(tmp_path: Path) -> None:
    generator = make(tmp_path)

    with pytest.raises(ModelError, match=r"no config\.json"):
        await generator.start()

    assert "stopped" in repr(generator)
    assert not [thread for thread in threading.enumerate() if thread.name == "decode"]


async def test_in_flight_answers_survive_many_updates(generator: HFGenerator, folders: dict[str, list[Path]]) -> None:
    models = [load(folders["llama"][version % 2]) for version in range(6)]
    subject = Subject(start=generator.start, num_slots=NUM_SLOTS, models=models, tolerance=1e-5, max_positions=512)  # type: ignore[arg-type]
    asked = [request(i, prompt=[5 + i, 6], max_new_tokens=300) for i in range(6)]
    tasks = [asyncio.create_task(generator.generate(one)) for one in asked]

    for version in range(1, 6):
        await generator.update_weights(version, buckets_of(models[version]), config=WeightsConfig())

    for one, task in zip(asked, tasks, strict=True):
        check_against(subject, one, await task)
