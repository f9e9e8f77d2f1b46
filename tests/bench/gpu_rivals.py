"""The losses of others on a CUDA device, each as its authors call it; those that are installed."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ops import TeacherScores
from tests.bench.gpu_clock import say


@dataclass(frozen=True)
class Rival:
    name: str
    loss: Callable[[], Tensor]
    """A scalar with a gradient."""
    note: str = ""

    def run(self) -> None:
        torch.autograd.backward(self.loss())


def on_scores(logits: Tensor, scores: TeacherScores) -> Iterator[Rival]:
    yield Rival("plain autograd ForwardKL", lambda: naive_forward_kl(logits, scores).sum())


def on_logits(logits: Tensor, teacher: Tensor) -> Iterator[Rival]:
    """JSD(0.5) of two whole vocabularies."""
    trl = _functions_of("trl", "experimental/gkd/gkd_trainer.py", ("generalized_jsd_loss",))
    if trl is not None:
        for dtype in (torch.bfloat16, torch.float32):
            yield Rival(
                f"TRL generalized_jsd_loss {str(dtype)[6:]}", functools.partial(_trl_jsd, trl, logits, teacher, dtype)
            )
    liger = _liger("jsd")
    if liger is not None:
        for dtype in (torch.bfloat16, torch.float32):
            yield Rival(
                f"Liger JSD, log_softmax {str(dtype)[6:]}",
                functools.partial(_liger_jsd, liger.LigerJSD(beta=0.5), logits, teacher, dtype),
            )


def on_hidden(hidden: Tensor, weight: Tensor, scores: TeacherScores) -> Iterator[Rival]:
    yield Rival("plain autograd ForwardKL", lambda: naive_forward_kl(hidden @ weight.t(), scores).sum())
    file = "experimental/async_distillation/async_distillation_trainer.py"
    names = ("_chunked_jsd_loss", "_jsd_loss_chunk", "_add_tail_bucket", "_jsd_divergence")
    trl = _functions_of("trl", file, names)
    if trl is not None:
        yield Rival("TRL async _chunked_jsd_loss ForwardKL", lambda: _trl_chunked(trl, hidden, weight, scores))
    liger = _liger("fused_linear_jsd")
    if liger is not None:
        jsd = liger.LigerFusedLinearJSD(jsd_beta=0.5)
        teacher = torch.randn_like(hidden), torch.randn_like(weight) * 0.04
        yield Rival(
            "Liger fused linear JSD",
            lambda: jsd(hidden, weight, *(tensor.detach() for tensor in teacher), None),
            note="whole vocabulary; makes the teacher's product, too",
        )


def naive_forward_kl(logits: Tensor, scores: TeacherScores) -> Tensor:
    """[T], as one writes it without a thought of memory; the sampled token is in the list."""
    log_q = logits.float().log_softmax(dim=1)
    support_log_q, log_p = log_q.gather(1, scores.top_ids), scores.top_logprobs
    tail_q = (1.0 - support_log_q.exp().sum(dim=1)).clamp(min=1e-12)
    tail_p = (1.0 - log_p.exp().sum(dim=1)).clamp(min=1e-12)
    return (log_p.exp() * (log_p - support_log_q)).sum(dim=1) + tail_p * (tail_p.log() - tail_q.log())


def _trl_jsd(trl: dict[str, Any], logits: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    loss: Tensor = trl["generalized_jsd_loss"](logits.to(dtype), teacher.to(dtype), beta=0.5, reduction="sum")
    return loss


def _trl_chunked(trl: dict[str, Any], hidden: Tensor, weight: Tensor, scores: TeacherScores) -> Tensor:
    loss: Tensor = trl["_chunked_jsd_loss"](
        hidden,
        weight,
        None,  # bias
        1.0,  # logit_scale
        None,  # final_logit_softcapping
        scores.top_ids,
        scores.top_logprobs,
        torch.ones_like(scores.top_ids, dtype=torch.bool),
        0.0,  # beta
        1.0,  # temperature
        True,  # add_tail_bucket
        None,  # teacher_id_idx
        1,  # num_teachers
        256,  # its _CHUNKED_LM_HEAD_CHUNK_SIZE
    )[0]
    return loss


def _liger_jsd(jsd: Any, logits: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    loss: Tensor = jsd(logits.log_softmax(-1, dtype=dtype), teacher.log_softmax(-1, dtype=dtype))
    return loss


def _liger(module: str) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        say("liger-kernel is not installed and not measured")
        return None
    try:
        return importlib.import_module(f"liger_kernel.transformers.{module}")
    except (ImportError, RuntimeError, AttributeError) as error:  # of another torch or transformers
        say(f"liger-kernel cannot be imported and is not measured: {error}")
        return None


def _functions_of(package: str, file: str, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Functions as they stand in a file of an installed package, without importing all that it needs to train."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        say(f"{package} is not installed and not measured")
        return None
    tree = ast.parse((Path(spec.origin).parent / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list.clear()
    namespace: dict[str, Any] = {"torch": torch, "F": functional}
    exec(compile(ast.Module(body=list(found), type_ignores=[]), file, "exec"), namespace)
    return namespace
