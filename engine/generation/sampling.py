"""Turns logits and one uniform number per row into a token and its two log-probabilities. Knows no model and no slots.

    n rows of a decode step   g rows of one kind   V vocabulary   B blocks of b = 256 ids, V rounded up   C candidates

What a row yields is a function of its own logits, settings and number: the others only share the passes over memory.
The distribution that is drawn from: softmax of logits / temperature, of which the ``top_k`` largest are kept, of which
the smallest set with mass ≥ ``top_p`` is kept, renormalised. Equal logits rank by id, the lower first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.types import SamplingParams

_BLOCK = 256
"""Ids per block of the two-level search: sums of 256 terms keep fp32 error at 1e-7, and B + 256 is far below V."""

_NUM_CANDIDATES = 1024
"""How far down the ranking top-p looks before it sorts the whole vocabulary."""


class Drawn(NamedTuple):
    """Of n rows, on the CPU."""

    ids: list[int]
    logprobs: list[float]
    """Nats under softmax(logits): temperature 1, whole vocabulary."""
    sampling_logprobs: list[float]
    """Nats under the distribution it was drawn from; 0 for greedy."""
    top_ids: npt.NDArray[np.int32] | None = None
    """[n, k] the ids with the largest logits, descending; k is the largest ``num_top_ids`` of the rows. None: k = 0."""


def check_params(params: SamplingParams) -> None:
    """Refuse settings that no distribution belongs to.

    Raises:
        ValueError: a field is out of its bounds.
    """
    if params.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {params.max_new_tokens}")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {params.top_p}; 1 keeps everything")
    if params.top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {params.top_k}; 0 keeps everything")
    if params.num_top_ids < 0:
        raise ValueError(f"num_top_ids must be >= 0, got {params.num_top_ids}")


class BatchSampler:
    """Draws for a fixed list of rows; made anew when the rows change, so that a decode step decides nothing twice."""

    def __init__(self, params: Sequence[SamplingParams], *, device: torch.device) -> None:
        self._device = device
        plain, tempered, filtered, greedy = [], [], [], []
        for row, p in enumerate(params):
            if p.temperature == 0:
                greedy.append(row)
            elif p.top_p < 1 or p.top_k > 0:
                filtered.append(row)
            elif p.temperature == 1:
                plain.append(row)
            else:
                tempered.append(row)
        self._plain = self._index(plain)
        self._tempered = self._index(tempered)
        self._filtered = self._index(filtered)
        self._greedy = self._index(greedy)
        self._filters = [params[row] for row in filtered]
        self._all_plain = len(plain) == len(params)
        self._num_top_ids = max((p.num_top_ids for p in params), default=0)
        self._temperature_n = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)

    def draw(self, logits_nV: Tensor, uniforms_n: npt.NDArray[np.float64]) -> Drawn:
        """One token per row.

        Args:
            logits_nV: [n, V] float32; left as it is.
            uniforms_n: [n] float64 in [0, 1), one per row.

        Raises:
            FloatingPointError: a row holds NaN or infinity.
        """
        n = len(logits_nV)
        max_n = logits_nV.amax(dim=-1)
        weights_nBb = _blocks(logits_nV, max_n)
        sums_nB = weights_nBb.sum(dim=-1).double()
        log_total_n = sums_nB.sum(dim=-1).log()
        # A NaN anywhere reaches the maximum; +inf gives exp(nan); rows of -inf alone give a NaN as well.
        if not bool(torch.isfinite(max_n.double() + log_total_n).all()):
            raise FloatingPointError(
                f"{int((~torch.isfinite(log_total_n)).sum())} of {n} rows of logits hold NaN or infinity: "
                "the weights that were loaded are broken, or the model overflows in its dtype"
            )
        u_n = torch.from_numpy(uniforms_n).to(self._device)
        top_ids = self._top_ids(logits_nV)
        if self._all_plain:
            ids_n = _search(weights_nBb, sums_nB, u_n)
            logprob_n = self._logprob(logits_nV, ids_n, max_n, log_total_n)
            values = logprob_n.tolist()
            return Drawn(ids_n.tolist(), values, values, top_ids)
        ids_n = torch.zeros(n, dtype=torch.long, device=self._device)
        sampling_n = torch.zeros(n, dtype=torch.float64, device=self._device)
        if self._plain is not None:
            rows = self._plain
            ids_n[rows] = _search(weights_nBb[rows], sums_nB[rows], u_n[rows])
            sampling_n[rows] = self._logprob(logits_nV[rows], ids_n[rows], max_n[rows], log_total_n[rows])
        if self._tempered is not None:
            rows = self._tempered
            scaled_gV = (logits_nV[rows] - max_n[rows, None]) / self._temperature_n[rows, None]
            zero_g = torch.zeros_like(max_n[rows])
            weights_gBb = _blocks(scaled_gV, zero_g)
            sums_gB = weights_gBb.sum(dim=-1).double()
            ids_n[rows] = _search(weights_gBb, sums_gB, u_n[rows])
            sampling_n[rows] = self._logprob(scaled_gV, ids_n[rows], zero_g, sums_gB.sum(dim=-1).log())
        if self._filtered is not None:
            rows = self._filtered
            scaled_gV = (logits_nV[rows] - max_n[rows, None]) / self._temperature_n[rows, None]
            ids_n[rows], sampling_n[rows] = _draw_filtered(scaled_gV, self._filters, u_n[rows])
        if self._greedy is not None:
            ids_n[self._greedy] = logits_nV[self._greedy].argmax(dim=-1)
        logprob_n = self._logprob(logits_nV, ids_n, max_n, log_total_n)
        return Drawn(ids_n.tolist(), logprob_n.tolist(), sampling_n.tolist(), top_ids)

    def _top_ids(self, logits_nV: Tensor) -> npt.NDArray[np.int32] | None:
        if self._num_top_ids == 0:
            return None
        ids_nk: npt.NDArray[np.int32] = logits_nV.topk(self._num_top_ids, dim=-1).indices.int().cpu().numpy()
        return ids_nk

    @staticmethod
    def _logprob(logits_nV: Tensor, ids_n: Tensor, max_n: Tensor, log_total_n: Tensor) -> Tensor:
        return logits_nV.gather(1, ids_n[:, None])[:, 0].double() - max_n.double() - log_total_n

    def _index(self, rows: list[int]) -> Tensor | None:
        return torch.tensor(rows, dtype=torch.long, device=self._device) if rows else None


def _blocks(logits_nV: Tensor, max_n: Tensor) -> Tensor:
    """[n, B, _BLOCK] exp(logits − max); ids beyond V weigh 0."""
    n, vocab = logits_nV.shape
    num_blocks = -(-vocab // _BLOCK)
    weights_nW = torch.empty((n, num_blocks * _BLOCK), dtype=torch.float32, device=logits_nV.device)
    weights_nV = weights_nW[:, :vocab]
    torch.sub(logits_nV, max_n[:, None], out=weights_nV)
    weights_nV.exp_()
    weights_nW[:, vocab:] = 0
    return weights_nW.view(n, num_blocks, _BLOCK)


def _search(weights_nBb: Tensor, sums_nB: Tensor, u_n: Tensor) -> Tensor:
    """[n] ids: where the cumulated weight first exceeds u · total. First the block, then the id in it.

    Cumulated in float64: in fp32 the small weights behind a large sum would vanish and never be drawn.
    """
    rows_n = torch.arange(weights_nBb.shape[0], device=weights_nBb.device)
    upto_nB = sums_nB.cumsum(dim=-1)
    target_n = _below(u_n * upto_nB[:, -1], upto_nB[:, -1])
    block_n = torch.searchsorted(upto_nB, target_n[:, None], right=True)[:, 0]
    before_n = upto_nB[rows_n, block_n] - sums_nB[rows_n, block_n]
    upto_nb = weights_nBb[rows_n, block_n].double().cumsum(dim=-1)
    rest_n = _below((target_n - before_n).clamp_min(0), upto_nb[:, -1])
    return block_n * _BLOCK + torch.searchsorted(upto_nb, rest_n[:, None], right=True)[:, 0]


def _below(target_n: Tensor, total_n: Tensor) -> Tensor:
    """Rounding may carry u · total up to the total; past the end there is no token."""
    return torch.minimum(target_n, torch.nextafter(total_n, torch.zeros_like(total_n)))


def _draw_filtered(scaled_gV: Tensor, filters: Sequence[SamplingParams], u_g: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and sampling log-probs of rows with top-k or top-p.

    Args:
        scaled_gV: (logits − max) / temperature.
    """
    vocab = scaled_gV.shape[1]
    top_k_g = torch.tensor([min(f.top_k or vocab, vocab) for f in filters], device=scaled_gV.device)
    top_p_g = torch.tensor([f.top_p for f in filters], dtype=torch.float64, device=scaled_gV.device)
    total_g = scaled_gV.exp().sum(dim=-1, dtype=torch.float64)
    wanted = max((f.top_k for f in filters if f.top_k), default=0)
    num_candidates = min(vocab, max(wanted, _NUM_CANDIDATES))
    values_gC, ids_gC, is_enough_g = _leaders(scaled_gV, num_candidates)
    mass_g = values_gC.double().exp().sum(dim=-1)
    # top-k rows never look past their k; the others need top_p of the mass among the candidates.
    is_enough_g &= (top_k_g <= num_candidates) | (mass_g >= top_p_g * total_g)
    ids_g = torch.empty(len(filters), dtype=torch.long, device=scaled_gV.device)
    logprob_g = torch.empty(len(filters), dtype=torch.float64, device=scaled_gV.device)
    short = torch.nonzero(is_enough_g)[:, 0]
    ids_g[short], logprob_g[short] = _draw_ranked(
        values_gC[short], ids_gC[short], top_k_g[short], top_p_g[short], total_g[short], u_g[short]
    )
    long = torch.nonzero(~is_enough_g)[:, 0]
    if len(long):
        values_hV, ids_hV = scaled_gV[long].sort(dim=-1, descending=True, stable=True)
        ids_g[long], logprob_g[long] = _draw_ranked(
            values_hV, ids_hV, top_k_g[long], top_p_g[long], total_g[long], u_g[long]
        )
    return ids_g, logprob_g


def _leaders(scaled_gV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``num`` largest values with their ids, ties by id, and whether no tie at the edge leaves that set open."""
    values_gC, ids_gC = scaled_gV.topk(num, dim=-1)
    # topk leaves the order of equal values open: sort by id, then stably by value.
    ids_gC = ids_gC.sort(dim=-1).values
    values_gC, order_gC = scaled_gV.gather(1, ids_gC).sort(dim=-1, descending=True, stable=True)
    ids_gC = ids_gC.gather(1, order_gC)
    is_clear_g = (scaled_gV >= values_gC[:, -1:]).sum(dim=-1) <= num
    return values_gC, ids_gC, is_clear_g


def _draw_ranked(
    values_gC: Tensor, ids_gC: Tensor, top_k_g: Tensor, top_p_g: Tensor, total_g: Tensor, u_g: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from rows of descending values that hold at least what the filters keep.

    Args:
        total_g: [g] sum of exp(value) over the whole vocabulary.
    """
    upto_gC = values_gC.double().exp().cumsum(dim=-1)
    num = values_gC.shape[1]
    last_k_g = top_k_g.clamp_max(num) - 1
    mass_g = torch.where(top_k_g > num, total_g, upto_gC.gather(1, last_k_g[:, None])[:, 0])
    # The smallest set with mass >= p ends at the first rank whose cumulated mass reaches it.
    last_p_g = (upto_gC < (top_p_g * mass_g)[:, None]).sum(dim=-1)
    last_g = torch.where(top_p_g < 1, torch.minimum(last_p_g, last_k_g), last_k_g)
    kept_g = upto_gC.gather(1, last_g[:, None])[:, 0]
    target_g = _below(u_g * kept_g, kept_g)
    drawn_g = torch.searchsorted(upto_gC, target_g[:, None], right=True)[:, 0]
    ids_g = ids_gC.gather(1, drawn_g[:, None])[:, 0]
    logprob_g = values_gC.gather(1, drawn_g[:, None])[:, 0].double() - kept_g.log()
    return ids_g, logprob_g
