"""Scores with a transformers causal language model. Decides the layout of a forward pass and what of it is kept.

All requests of a batch go through the model together, in the layout that the model was seen to compute rightly when it
was loaded: as a trie (common prefixes once) with attention by branch or behind a mask, padded, or one by one. Only the
rows that a response needs go through the output layer, and never more than ``block_rows`` of them at a time. Knows
nothing of queues or HTTP.

    N token positions computed     R rows that are scored     D hidden size     V vocabulary     K top_k
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.generic import ModelOutput

from engine.errors import ModelError, NonFiniteError
from engine.packed_linear import pack_linears
from engine.precision import compute_dtype
from engine.recipe_fields import ComputeDtype
from engine.training.packing import PackedBatch, PaddedBatch, pack, packing_obstacle, pad, rope_obstacle, split_padded
from engine.training.rms_norm import use_own_norms
from engine.training.tree_attention import NAME as TREE_ATTENTION
from engine.training.tree_attention import tree_of
from engine.transport.handoff import use_own_stream
from teacher.folder import info_of, length_limit, one_line, read_config, refuse_quantised
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, Scores, TeacherInfo
from teacher.top_k import every_id, of_whole_rows, top_k_by_id

Layout = Literal["tree", "packed", "padded", "single"]
"""One trie with attention by branch; one trie with a mask; rows of similar length; one request at a time."""

# How far the logits of a layout may lie from those of plain forward passes, as a share of their standard deviation.
# A wrong mask or a forgotten scale is off by more than a tenth; summing in another order by 1e-6 and, in half
# precision, by a few hundredths.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class TorchStatistics(msgspec.Struct, frozen=True, kw_only=True):
    forward_passes_total: int
    computed_tokens_total: int
    """Token positions that went through the model: shared prefixes once, padding included."""
    head_rows_total: int
    """Rows that went through the output layer."""
    peak_block_rows: int
    """Most full-vocabulary rows that were held at a time."""


class TorchBackend:
    """One model on one device. ``load`` and ``score`` are called from one thread, the same one.

    Args:
        model: folder in Hugging Face format, with tokenizer.
        device: as torch names it.
        dtype: of weights and activations; log-probabilities are made in float32 from the model's own logits.
        num_threads: CPU threads of ``load`` and ``score``; None leaves torch's choice.
        block_rows: full-vocabulary rows held at a time.
        max_top_k: largest top_k, and number of extra ids per token; None: the vocabulary.
        max_length: prompt and response tokens together; None: the model's own limit.
        padded_tokens: most token positions of one forward pass when the model cannot run packed.
        whole_by_id: who asks for the whole vocabulary gets it in the order of ids, unsorted.
        allow_quantised: take a checkpoint with a ``quantization_config``.
        trust_remote_code: run Python code that lies in the model's folder.
    """

    def __init__(
        self,
        *,
        model: str,
        device: str = "cpu",
        dtype: ComputeDtype = "float32",
        num_threads: int | None = None,
        block_rows: int = 128,
        max_top_k: int | None = None,
        max_length: int | None = None,
        padded_tokens: int = 2048,
        whole_by_id: bool = False,
        allow_quantised: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._folder = Path(model)
        self._device_name = device
        self._dtype_name: ComputeDtype = dtype
        self._num_threads = num_threads
        self._block_rows = block_rows
        self._max_top_k = max_top_k
        self._max_length = max_length
        self._padded_tokens = padded_tokens
        self._whole_by_id = whole_by_id
        self._allow_quantised = allow_quantised
        self._trust_remote_code = trust_remote_code
        self._forward_passes = self._computed_tokens = self._head_rows = self._peak_block_rows = 0
        self._device: torch.device
        self._dtype: torch.dtype
        self._model: PreTrainedModel
        self._head: Head
        self._info: TeacherInfo
        self._attention: str
        self.layout: Layout
        """Chosen by ``load``."""

    @property
    def info(self) -> TeacherInfo:
        """Known after ``load``."""
        return self._info

    def statistics(self) -> TorchStatistics:
        return TorchStatistics(
            forward_passes_total=self._forward_passes,
            computed_tokens_total=self._computed_tokens,
            head_rows_total=self._head_rows,
            peak_block_rows=self._peak_block_rows,
        )

    def load(self) -> None:
        """Read model and tokenizer and find the layout.

        Raises:
            ModelError: folder, weights or tokenizer missing or broken, quantised, not a causal language model, device
                not there, or a model whose output layer cannot be applied to chosen rows.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            self._device = torch.device(self._device_name)
        except RuntimeError as error:
            raise ModelError(f"device {self._device_name!r} is none that torch knows: {one_line(error)}") from None
        self._dtype = compute_dtype(self._dtype_name, self._device)
        config, tokenizer = read_config(self._folder, trust_remote_code=self._trust_remote_code)
        refuse_quantised(config, folder=self._folder, is_allowed=self._allow_quantised)
        self._model = self._read_model(config)
        use_own_stream(self._device)
        config = self._model.config
        max_length = length_limit(config, self._max_length, folder=self._folder)
        head = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            raise ModelError(f"model folder {str(self._folder)!r} has no output layer; is it a causal language model?")
        vocab_size = int(head.weight.shape[0])
        self._info = info_of(
            self._folder, tokenizer, vocab_size=vocab_size, max_length=max_length, max_top_k=self._max_top_k
        )
        with torch.inference_mode():
            self._find_layout(config, max_length)

    def use_layout(self, layout: Layout) -> None:
        """Lay out batches like this from here on. Tree attention serves only its own layout: it knows no masks."""
        attention = TREE_ATTENTION if layout == "tree" else self._attention
        if self._model.config._attn_implementation != attention:
            self._model.set_attn_implementation(attention)
        self.layout = layout

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Answer requests that fit ``info`` (``check_fits``), in the order given.

        Raises:
            NonFiniteError: the model gave a NaN or +inf logit.
        """
        # The last response token is scored, never read.
        sequences = [np.concatenate((r.prompt_ids, r.response_ids[:-1])).astype(np.int64) for r in requests]
        scores: list[Scores | None] = [None] * len(requests)
        for group in self._groups(sequences):
            with torch.inference_mode():
                hidden_ND, index = self._forward([sequences[i] for i in group])
                answers = self._score_rows(hidden_ND, [requests[i] for i in group], index)
            for i, answer in zip(group, answers, strict=True):
                scores[i] = answer
        return [answer for answer in scores if answer is not None]

    def _groups(self, sequences: Sequence[npt.NDArray[np.int64]]) -> list[list[int]]:
        if self.layout in ("tree", "packed"):
            return [list(range(len(sequences)))]
        if self.layout == "single":
            return [[i] for i in range(len(sequences))]
        lengths = [len(sequence) for sequence in sequences]
        return split_padded(lengths, max(self._padded_tokens, *lengths))

    def _forward(self, sequences: list[npt.NDArray[np.int64]]) -> tuple[Tensor, Sequence[npt.NDArray[np.int64]]]:
        """[N, D] hidden states and, per sequence, the row of each token."""
        batch: PackedBatch | PaddedBatch
        options: dict[str, Any] = {}
        if len(sequences) == 1:
            # One branch needs no mask: the model's own causal path is faster and takes N, not N², memory.
            batch = pad(sequences)
            inputs: dict[str, Any] = {"input_ids": batch.token_ids}
        elif self.layout == "tree":
            batch = pack(sequences)
            inputs = {"input_ids": batch.token_ids[None], "position_ids": batch.position_ids[None]}
            # Behind a mask each row is multiplied with all others: for 32 sequences of 90 tokens that took three times
            # as long as the rest of the pass (hidden 256, 8 layers).
            options["tree"] = tree_of(batch, device=self._device)
        elif self.layout == "packed":
            batch = pack(sequences)
            inputs = {
                "input_ids": batch.token_ids[None],
                "position_ids": batch.position_ids[None],
                "attention_mask": batch.mask()[None, None],
            }
        else:
            batch = pad(sequences)
            inputs = {"input_ids": batch.token_ids, "attention_mask": batch.mask.astype(np.int64)}
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        self._forward_passes += 1
        self._computed_tokens += batch.num_tokens
        output = self._model.base_model(**tensors, **options, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1]), batch.index

    def _score_rows(
        self, hidden_ND: Tensor, requests: Sequence[ScoreRequest], index: Sequence[npt.NDArray[np.int64]]
    ) -> list[Scores]:
        rows = [rows[len(r.prompt_ids) - 1 :] for r, rows in zip(requests, index, strict=True)]
        # n samples of a prompt all need its last row: it goes through the output layer once.
        unique_R, places = np.unique(np.concatenate(rows), return_inverse=True)
        bounds = np.cumsum([len(r) for r in rows])[:-1]
        request_places = np.split(places, bounds)
        lookup_rows, lookup_ids = _lookups(requests, request_places)
        order = np.argsort(lookup_rows, kind="stable")
        top_k = max(request.top_k for request in requests)
        is_whole = self._whole_by_id and top_k == self._info.vocab_size
        top_ids = np.empty((len(unique_R), 0 if is_whole else top_k), np.int32)
        top_logprobs = np.empty((len(unique_R), top_k), np.float32)
        looked_up = np.empty(len(lookup_rows), np.float32)
        for start in range(0, len(unique_R), self._block_rows):
            stop = min(start + self._block_rows, len(unique_R))
            first, last = np.searchsorted(lookup_rows[order], (start, stop))
            chosen = order[first:last]
            logits_RV = self._head.logits(hidden_ND[torch.from_numpy(unique_R[start:stop]).to(self._device)])
            self._head_rows += stop - start
            self._peak_block_rows = max(self._peak_block_rows, stop - start)
            block = score_block(
                logits_RV,
                top_k=None if is_whole else top_k,
                rows=torch.from_numpy(lookup_rows[chosen] - start).to(self._device),
                ids=torch.from_numpy(lookup_ids[chosen]).to(self._device),
            )
            ids, top_logprobs[start:stop], looked_up[chosen] = (part.cpu().numpy() for part in block)
            if not is_whole:
                top_ids[start:stop] = ids
        if np.isnan(top_logprobs).any() or np.isnan(looked_up).any():
            raise NonFiniteError(
                f"model {self._info.model!r} gave logits that are NaN or infinite; "
                "run it in a wider dtype (--dtype float32) or mend its weights"
            )
        for logprobs in (top_logprobs, looked_up):
            np.maximum(logprobs, np.float32(LOWEST_LOGPROB), out=logprobs)
        answers = []
        offset = 0
        for request, place in zip(requests, request_places, strict=True):
            if is_whole:
                its_ids, its_logprobs = of_whole_rows(top_logprobs[place], request.top_k)
            else:
                its_ids, its_logprobs = top_ids[place, : request.top_k], top_logprobs[place, : request.top_k]
            num_response = len(request.response_ids)
            width = 1 if request.extra_ids is None else 1 + request.extra_ids.shape[1]
            values = looked_up[offset : offset + num_response * width].reshape(num_response, width)
            offset += num_response * width
            answers.append(
                Scores(
                    top_ids=its_ids,
                    top_logprobs=its_logprobs,
                    sampled_logprobs=values[:, 0],
                    extra_logprobs=None if request.extra_ids is None else values[:, 1:],
                )
            )
        return answers

    def _read_model(self, config: Any) -> PreTrainedModel:
        folder = str(self._folder)
        options: dict[str, Any] = {
            "output_loading_info": True,
            "config": config,
            "dtype": self._dtype,
            "local_files_only": True,
            "trust_remote_code": self._trust_remote_code,
        }
        try:
            # sdpa takes a boolean tree mask as it is; a model that has only eager attention is loaded as it wants.
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)
            except (ValueError, ImportError):
                loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
            model: PreTrainedModel = loaded[0].eval().requires_grad_(False).to(self._device)
            missing = sorted(loaded[1]["missing_keys"])
        # Broken weight files, unknown architectures and absent devices each have an exception type of their own.
        except Exception as error:
            raise ModelError(f"model in {folder!r} cannot be loaded: {one_line(error)}") from error
        if missing:
            raise ModelError(
                f"the weights in {folder!r} lack {len(missing)} tensors of the model, {missing[0]!r} among them; "
                "is the checkpoint complete?"
            )
        return model

    def _find_layout(self, config: Any, max_length: int) -> None:
        """Settle head and layout by comparing with plain forward passes of the whole model on a few tokens."""
        length = min(6, max_length)
        stem, tail = np.split(np.arange(1, 2 * length + 1) % self._info.vocab_size, 2)
        half = (length + 1) // 2
        # Two that share a prefix, and a shorter one that shares nothing.
        probes = [stem, np.concatenate((stem[:half], tail))[:length], tail[:half]]
        if self._device.type == "cpu":
            # Checked by themselves, and in bfloat16 closer to float32 than the model's own, which round twice: by 0.24
            # instead of 1.6 standard deviations of the logits, where SmolLM2 reads nonsense.
            use_own_norms(self._model)
        expected = torch.cat([self._plain_logits(probe) for probe in probes])
        if not torch.isfinite(expected).all():
            raise ModelError(
                f"model in {str(self._folder)!r}: its logits are not finite; are its weights whole, and is "
                f"{self._model.dtype} wide enough for them?"
            )
        scale = self._tolerance(expected)
        # In float32 the rounding of packed layers adds up to more than the 1e-4 nats that answers may lie from a plain
        # pass; in bfloat16 they give the very bits of plain ones.
        if self._dtype == torch.bfloat16:
            pack_linears(self._model, device=self._device)
        self._attention = self._model.config._attn_implementation
        self.use_layout("single")
        self._head = self._find_head(probes, expected, scale)
        for layout in self._candidates(config, max_length):
            self.use_layout(layout)
            if self._deviation(probes, expected) <= scale:
                break
        self._forward_passes = self._computed_tokens = 0

    def _find_head(self, probes: list[npt.NDArray[np.int64]], expected: Tensor, scale: float) -> Head:
        probe = torch.from_numpy(probes[0])[None].to(self._device)
        output_type = type(self._model.base_model(input_ids=probe, use_cache=False))
        heads: tuple[Head, ...] = (LinearHead(self._model), ForwardHead(self._model, output_type))
        for head in heads:
            self._head = head
            if self._deviation(probes, expected) <= scale:
                return head
        raise ModelError(
            f"model in {str(self._folder)!r}: its output layer, applied to single rows, does not give the model's own "
            "logits; this architecture cannot be scored in blocks"
        )

    def _candidates(self, config: Any, max_length: int) -> list[Layout]:
        text = config.get_text_config()
        candidates: list[Layout] = []
        if self._attention == "sdpa" and packing_obstacle(text, longest=max_length) is None:
            candidates += ["tree", "packed"] if self._device.type == "cpu" else ["packed"]
        if rope_obstacle(text) is None:
            candidates.append("padded")
        return [*candidates, "single"]

    def _deviation(self, probes: list[npt.NDArray[np.int64]], expected: Tensor) -> float:
        """Largest difference to the expected logits; infinite when the model refuses the layout."""
        groups = [probes] if self.layout != "single" else [[probe] for probe in probes]
        found = []
        try:
            for group in groups:
                hidden_ND, index = self._forward(group)
                rows = torch.from_numpy(np.concatenate(index)).to(self._device)
                found.append(self._head.logits(hidden_ND[rows]).float().clone())
            return float((torch.cat(found) - expected).abs().max())
        # What a model says to an argument that it does not know differs from one to the next.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return float("inf")

    def _plain_logits(self, probe: npt.NDArray[np.int64]) -> Tensor:
        logits: Tensor = self._model(input_ids=torch.from_numpy(probe)[None].to(self._device), use_cache=False).logits
        return logits[0].float()

    def _tolerance(self, expected: Tensor) -> float:
        return _TOLERANCE[self._dtype] * float(expected.std()) + 1e-6


class LinearHead:
    """The output layer alone: right for models whose forward does nothing else to the hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layer: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._block = torch.empty(0)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] in the model's dtype; valid until the next call."""
        layer = self._layer
        # A packed layer is faster than what is saved by keeping the block.
        if type(layer) is not nn.Linear or layer.bias is not None:
            logits: Tensor = layer(hidden_RD)
            return logits
        # The block is kept: on CPU, first touches of fresh memory cost as much as the product.
        num_rows, vocab_size = len(hidden_RD), layer.out_features
        if len(self._block) < num_rows:
            self._block = torch.empty((num_rows, vocab_size), dtype=hidden_RD.dtype, device=hidden_RD.device)
        return torch.mm(hidden_RD, layer.weight.t(), out=self._block[:num_rows])


class ForwardHead:
    """The model's own forward with its body replaced by given hidden states: keeps soft caps, scales and whatever else
    stands between body and logits."""

    def __init__(self, model: PreTrainedModel, output_type: type[ModelOutput]) -> None:
        self._body = _Given(output_type)
        # A copy that shares every module except the body; the model itself stays whole.
        self._model = copy.copy(model)
        self._model._modules = dict(model._modules)
        self._model._modules[model.base_model_prefix] = self._body

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] in the model's dtype."""
        self._body.hidden = hidden_RD[None]
        token_ids = torch.zeros((1, len(hidden_RD)), dtype=torch.int64, device=hidden_RD.device)
        logits: Tensor = self._model(input_ids=token_ids, use_cache=False).logits
        return logits[0]


Head = LinearHead | ForwardHead


class _Given(nn.Module):
    """Stands where a model's body is."""

    hidden: Tensor

    def __init__(self, output_type: type[ModelOutput]) -> None:
        super().__init__()
        self._output_type = output_type

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        return self._output_type(last_hidden_state=self.hidden)


def _lookups(
    requests: Sequence[ScoreRequest], places: Sequence[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and token id of each single value asked for: per response token the sampled one, then the extra ones."""
    rows, ids = [], []
    for request, place in zip(requests, places, strict=True):
        wanted = request.response_ids[:, None]
        if request.extra_ids is not None:
            wanted = np.concatenate((wanted, request.extra_ids), axis=1)
        rows.append(np.repeat(place, wanted.shape[1]))
        ids.append(wanted.reshape(-1).astype(np.int64))
    return np.concatenate(rows), np.concatenate(ids)


def score_block(logits_RV: Tensor, *, top_k: int | None, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k ids [R, K], their log-probabilities [R, K], and those of ``(rows, ids)`` pairs; float32.

    ``top_k=None``: the whole vocabulary in the order of its ids. A float32 ``logits_RV`` is overwritten.
    """
    logits_RV = logits_RV.float()
    if top_k is None:
        logprobs_RV = logits_RV.log_softmax(dim=-1)
        return every_id(logprobs_RV), logprobs_RV, logprobs_RV[rows, ids]
    top_ids, top = top_k_by_id(logits_RV, top_k)
    looked_up = logits_RV[rows, ids]
    highest = top[:, :1].clone()
    # In place: a second block of full-vocabulary rows would double what is held.
    log_total = logits_RV.sub_(highest).exp_().sum(dim=-1, keepdim=True).log_().add_(highest)
    return top_ids, top - log_total, looked_up - log_total[rows, 0]
