"""A rank's part of a checkpoint, in Megatron's distributed format: every tensor whole, under a name that no layout is
part of, so that any layout of the same student goes on from it.

    trainer/    *.distcp    weights, master weights, moments, the router's biases
                state.json  the step, and how many updates AdamW has made

Three things are done otherwise than in Megatron. Its optimizer has one part for experts and one for the rest, but only
where experts are spread over ranks, and saves each part's settings; here the tensors alone are saved, and settings come
from the recipe. Its writer starts two processes on every rank at each save; here the rank writes by itself. And of
what it gathers it takes the padding between buckets out and then looks for parameters where they were with it, so that
one is saved with the moments of another (its own comment suspects as much); here they stay where they are.

Nothing but tensors is saved: what else a module would keep (``_extra_state``) is a pickle, and empty here. The index is
one, too, and is read by ``index``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from engine.errors import CheckpointError
from engine.training.megatron_inside.index import IndexReader
from engine.training.megatron_inside.model import unwrapped
from engine.training.megatron_inside.optimizer import StepOptimizer

STATE = "state.json"
_SHARDING = "fully_reshardable"
_ZIP_WRITER = "inline_container"
"""The source file that its failed assertions name."""


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = 1
    version: int
    """Optimizer steps done, skipped ones too: the place in the learning rate schedule."""
    num_updates: int
    """Steps that AdamW has made."""


def save(folder: Path, chunk: DistributedDataParallel, optimizer: StepOptimizer, *, version: int) -> None:
    """Write ``folder``, which all ranks see. Collective; of the gradient nothing is saved.

    Raises:
        OSError: a rank cannot write its tensors, or nobody the folder; all raise. When ``state.json`` alone cannot be
            written, rank 0 raises, and the others have written theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)  # by every rank: what one of them meets, all meet
    with _as_exceptions():
        dist_checkpointing.save(
            _sharded(chunk, optimizer, is_loading=False), str(folder), sharded_strategy=_WriteHere("torch_dist", 1)
        )
    if dist.get_rank() == 0:
        state = _State(version=version, num_updates=optimizer.num_updates)
        (folder / STATE).write_bytes(msgspec.json.encode(state))


def load(folder: Path, chunk: DistributedDataParallel, optimizer: StepOptimizer) -> int:
    """Set weights, master weights and moments; returns the version. Collective.

    Raises:
        CheckpointError: a file is missing or broken, or of another program or student.
    """
    state = _read_state(folder)
    wanted = _sharded(chunk, optimizer, is_loading=True)
    try:
        with _as_exceptions():
            found = dist_checkpointing.load(wanted, str(folder), sharded_strategy=_ReadHere())
    except CheckpointError as error:
        raise CheckpointError(f"trainer state in {str(folder)!r} cannot be read: {error}") from error
    except Exception as error:  # torch, Megatron, zip files and pickles raise a dozen kinds; all mean this folder
        raise CheckpointError(
            f"trainer state in {str(folder)!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    missing, unexpected = unwrapped(chunk).load_state_dict(found["model"], strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing, f"asked for by name, and not found: {missing}"
    assert not unexpected, f"not asked for, and found: {unexpected}"
    for number, part in enumerate(optimizer.megatron.chained_optimizers):
        groups = part.state_dict()["optimizer"]["param_groups"]
        for group in groups:
            group["step"] = state.num_updates
        part.load_state_dict(
            {
                "optimizer": {"param_groups": groups},
                "param_state": found[f"optimizer.{number}"],
                "param_state_sharding_type": _SHARDING,
            }
        )
    return state.version


def _sharded(chunk: DistributedDataParallel, optimizer: StepOptimizer, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": _SHARDING,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    whole = unwrapped(chunk).sharded_state_dict(metadata=metadata)
    model = {name: sharded for name, sharded in whole.items() if not isinstance(sharded, ShardedObject)}
    tensors: dict[str, Any] = {"model": model}
    for number, part in enumerate(optimizer.megatron.chained_optimizers):
        part.get_parameter_state_dp_zero = partial(_padded_state, part)
        whole = part.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        tensors[f"optimizer.{number}"] = whole["param_state"]
    return tensors


def _padded_state(part: Any, **options: Any) -> dict[Any, Any]:
    """Megatron's ``get_parameter_state_dp_zero``, with every parameter's state where ``param_index_map`` says."""
    state: dict[Any, Any] = type(part).get_parameter_state_dp_zero(part, **options)
    for number, buffer in enumerate(part.buffers):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _with_padding(tensors[name], buffer.buckets)
    return state


def _with_padding(packed: Tensor, buckets: Sequence[Any]) -> Tensor:
    """[elements of all buckets, padding included], of what has them one after the other."""
    padded = packed.new_zeros(sum(len(bucket.grad_data) for bucket in buckets))
    for bucket, values in zip(buckets, torch.split(packed, [bucket.numel_unpadded for bucket in buckets]), strict=True):
        padded[bucket.offset : bucket.offset + len(values)] = values
    return padded


def _read_state(folder: Path) -> _State:
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"trainer state in {str(folder)!r} cannot be read: {error}; was it written with learner.backend='megatron'?"
        ) from error
    if state.format != 1:
        raise CheckpointError(
            f"trainer state in {str(folder)!r} has format {state.format}, this program reads 1; resume with the "
            "program that wrote it"
        )
    return state


@contextmanager
def _as_exceptions() -> Iterator[None]:
    """torch tells all ranks of what one of them met, in an exception that nobody catches; here it is what was met."""
    try:
        yield
    except CheckpointException as told:
        (cause, _), *_ = told.failures.values()
        # Of a write that failed torch's zip writer says nothing but that it is not where it should be.
        if isinstance(cause, RuntimeError) and _ZIP_WRITER in str(cause):
            raise OSError(f"a file was cut short; is the disk full? ({cause})") from None
        raise cause from None


class _ReadHere(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Megatron's format, with an index that nothing is run of."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        tensors, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        wanted = mcore_to_pyt_state_dict(tensors, True)
        state_dict_loader.load(
            wanted,
            storage_reader=IndexReader(checkpoint_dir),
            planner=MCoreLoadPlanner(
                shapes_validation_sharded_tensors=list(nested_values(sharded_state_dict)),
            ),
        )
        found = {name: _unwrap_pyt_sharded_tensor(tensor) for name, tensor in wanted.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(found, flat, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _WriteHere(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's format, written by torch's own writer in this process."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        state_dict_saver.save(
            mcore_to_pyt_state_dict(tensors, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )
