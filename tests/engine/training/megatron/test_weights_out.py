"""From the ranks to the node, beside the computation of the next step: real processes, started as a run starts them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.generation.version import Arrival, tensor_groups
from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.training.export import named_tensors
from engine.training.megatron import MegatronTrainer
from engine.transport.manifest import digest_of
from tests.engine.training.cases import make_step
from tests.support.models import Arch, load, plain_logits, tiny_model

IDS = tuple(3 + 7 * i % 90 for i in range(40))


@contextmanager
def started(
    folder: Path, logs: Path, *, device: str = "cpu", rollouts_per_step: int | None = None, **layout: Any
) -> Iterator[MegatronTrainer]:
    megatron = MegatronConfig(**{"dtype": "float32", **layout})
    config = LearnerConfig(backend="megatron", device=device, lr=1e-2, micro_batch_tokens=128, megatron=megatron)
    trainer = MegatronTrainer(
        config=config,
        student=StudentConfig(path=str(folder)),
        objective=ObjectiveConfig(),
        steps=10,
        folder=logs,
        rollouts_per_step=rollouts_per_step,
    )
    trainer.start()
    try:
        yield trainer
    finally:
        trainer.stop()


def logprobs(folder: Path) -> list[float]:
    """Of ``IDS`` but the first, by transformers."""
    logprobs_LV = plain_logits(load(folder), IDS)[:-1].double().log_softmax(-1)
    found: list[float] = logprobs_LV.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize(
    ("arch", "layout", "device"),
    [
        ("qwen3", {"tensor_parallel": 2}, "cpu"),
        ("deepseek_v3", {"data_parallel": 2, "expert_parallel": 2}, "cpu"),
        pytest.param("qwen3", {}, "cuda", marks=pytest.mark.gpu),
        pytest.param("deepseek_v3", {}, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_version_travels_whole_while_the_next_step_is_computed(
    arch: Arch, layout: dict[str, Any], device: str, tmp_path: Path
) -> None:
    """It can be given up in the middle, and is what transformers finds in the folder that is saved."""
    folder = tiny_model(tmp_path / "student", arch=arch, tied=arch == "qwen3", scale=0.05)
    scored = make_step()
    close = 1e-5 if device == "cpu" else 1e-4
    with started(folder, tmp_path / "logs", device=device, **layout) as trainer:
        before = digest_of(named_tensors(load(folder)))
        assert trainer.digest() == before
        assert trainer.score(IDS) == pytest.approx(logprobs(folder), abs=close)

        arrival = Arrival(tensor_groups(load(folder)), digest=before)
        failures: list[BaseException] = []
        has_begun, may_end = threading.Event(), threading.Event()

        def receive() -> None:
            try:
                for bucket in trainer.export(bucket_bytes=1 << 12):
                    for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                        arrival.expect(name, tensor)
                        arrival.add(name, tensor)
                    has_begun.set()
                    may_end.wait(60.0)
            except BaseException as error:
                failures.append(error)

        receiver = threading.Thread(target=receive)
        receiver.start()
        assert has_begun.wait(60.0)
        trainer.accumulate(scored)  # would never return if a pass waited for an export
        may_end.set()
        trainer.accumulate(scored)
        receiver.join(60.0)
        assert not receiver.is_alive()
        assert failures == []
        arrival.complete()

        # One that nobody wants any more is given up in the middle.
        unwanted = trainer.export(bucket_bytes=1 << 12)
        next(unwanted)
        unwanted.close()  # type: ignore[attr-defined]

        trainer.finish_step()
        after = trainer.digest()
        assert after != before
        trainer.save(tmp_path / "saved")
        assert digest_of(named_tensors(load(tmp_path / "saved" / "student"))) == after
        assert trainer.score(IDS) == pytest.approx(logprobs(tmp_path / "saved" / "student"), abs=close)


@pytest.mark.parametrize(
    ("arch", "layout", "device"),
    [
        ("deepseek_v3", {"data_parallel": 2, "expert_parallel": 2}, "cpu"),
        pytest.param("deepseek_v3", {}, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_version_leaves_whole_while_ranks_still_gather_it(
    arch: Arch, layout: dict[str, Any], device: str, tmp_path: Path
) -> None:
    """And its weights are those of a learner that waits for every sum and gather."""
    folder = tiny_model(tmp_path / "student", arch=arch, scale=0.05)
    first, second = make_step(seed=1), make_step(seed=2)
    digests = []
    for overlap in (False, True):
        switches = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
        num = len(first) + len(second)
        logs = tmp_path / str(overlap)
        with started(folder, logs, device=device, rollouts_per_step=num, **layout, **switches) as trainer:
            digests.append(found := list[str]())
            for _ in range(3):
                trainer.accumulate(first)
                trainer.accumulate(second)
                with pytest.raises(RuntimeError, match=r"would get \d+ rollouts, rollouts_per_step is \d+; call fin"):
                    trainer.accumulate(second)
                trainer.finish_step()
                with ThreadPoolExecutor(1) as pool:
                    leaving = pool.submit(trainer.digest)
                    trainer.score(IDS)  # a forward pass, which waits for weights as it needs them
                    found.append(leaving.result(60.0))
            trainer.save(tmp_path / "saved")
            assert digest_of(named_tensors(load(tmp_path / "saved" / "student"))) == found[-1]

    assert digests[0] == digests[1]
