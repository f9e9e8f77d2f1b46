"""Which prompts a run has, and which of them comes when.

Three decisions, each a function of the file, the recipe and the seed alone: which rows of a prompt file can be used
(``load_prompts``), which occurrence stands behind a ticket (``PromptOrder``), and what a sampler is given for it
(``PromptSource``). Nothing here remembers what was handed out: that is the ledger's.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from engine.errors import DataError, ModelAbsent, ModelError
from engine.prompt_files import RawRow, read_rows
from engine.recipe import DataConfig
from engine.streams import stream_key, uniform
from engine.types import Prompt

__all__ = ["PromptOrder", "PromptRow", "PromptSet", "PromptSource", "Tokenizer", "load_prompts", "load_tokenizer"]

log = structlog.get_logger(__name__)

_TOKENIZER_FILES: Final = ("*token*", "vocab.*", "merges.txt", "*.model")

_BLOCK_ROWS: Final = 512
"""Rows tokenized in one call: enough for the tokenizer's threads, small enough for memory."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    @property
    def chat_template(self) -> Any:
        """None when the model is not a chat model."""
        ...

    @property
    def eos_token_id(self) -> Any:
        """None when there is no end-of-sequence token."""
        ...

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """``{"input_ids": [[…], …]}``, one list per text."""
        ...

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """The conversation as text, with special tokens spelled out, when ``tokenize`` is False."""
        ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...


class PromptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One usable row of a prompt file."""

    prompt_index: int
    """Row in the file, counted from 0; blank lines do not count."""
    token_ids: tuple[int, ...]
    """As the student sees them: chat template and special tokens included."""
    reference_ids: tuple[int, ...] | None
    """The reference completion, with the end-of-sequence id behind it if ``reference_ends``; None: the row has none."""
    text: str
    """The prompt for people: the string, or the messages one after the other. Empty unless texts were kept."""


class PromptSet:
    """The usable rows of one file, tokenized. Made by ``load_prompts``; 4 bytes per token, plus the texts if kept.

    Iterates in the order of the file.
    """

    def __init__(self, *, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.num_filtered = 0
        """Rows left out because prompt or reference did not fit."""
        self._indices = array("q")
        self._tokens = array("i")
        self._ends = array("q")
        self._references = array("i")
        self._reference_ends = array("q")
        self._texts: list[str] | None = None
        self._digest = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[PromptRow]:
        return (self._at(position) for position in range(len(self)))

    def __repr__(self) -> str:
        return f"<PromptSet {self.name!r} {str(self.path)!r}: {len(self)} rows, {self.num_filtered} filtered>"

    @property
    def indices(self) -> Sequence[int]:
        """``prompt_index`` of every usable row, ascending."""
        return self._indices

    @property
    def num_references(self) -> int:
        """Rows that have a reference completion."""
        starts = [0, *self._reference_ends[:-1]]
        return sum(end > start for start, end in zip(starts, self._reference_ends, strict=False))

    @property
    def digest(self) -> str:
        """Hex digest over index, prompt ids and reference ids of every row.

        It changes whenever a ticket would mean something else, so it belongs into the identity of a run's ledger.
        """
        return self._digest.hexdigest()

    def row(self, prompt_index: int) -> PromptRow:
        """The row of the file.

        Raises:
            KeyError: the row is not in the set: filtered, or outside of the rows asked for.
        """
        position = bisect.bisect_left(self._indices, prompt_index)
        if position == len(self._indices) or self._indices[position] != prompt_index:
            raise KeyError(f"row {prompt_index} of {self.path} is not among the {len(self)} usable rows")
        return self._at(position)

    def _at(self, position: int) -> PromptRow:
        reference = _slice(self._references, self._reference_ends, position)
        return PromptRow(
            prompt_index=self._indices[position],
            token_ids=_slice(self._tokens, self._ends, position),
            reference_ids=reference or None,  # one without a token is none
            text="" if self._texts is None else self._texts[position],
        )

    def _add(self, prompt_index: int, token_ids: list[int], reference_ids: list[int] | None, text: str | None) -> None:
        reference = array("i", reference_ids or ())
        tokens = array("i", token_ids)
        self._indices.append(prompt_index)
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))
        self._references.extend(reference)
        self._reference_ends.append(len(self._references))
        if text is not None:
            self._texts = [] if self._texts is None else self._texts
            self._texts.append(text)
        self._digest.update(array("q", (prompt_index, len(tokens), len(reference))).tobytes())
        self._digest.update(tokens.tobytes())
        self._digest.update(reference.tobytes())


class PromptOrder:
    """Which occurrence stands behind a ticket. Pure: with equal arguments a ticket means the same in every process.

    Tickets run epoch by epoch; within an epoch every prompt comes once, its samples one after the other, so that they
    can be prefilled together. With ``shuffle`` each epoch has its own order, made from ``seed`` and its number.

    Example::

        order = PromptOrder([4, 7], samples_per_prompt=2, seed=0, shuffle=False)
        assert [order.occurrence(ticket) for ticket in range(3)] == [(0, 4, 0), (0, 4, 1), (0, 7, 0)]
    """

    def __init__(self, indices: Sequence[int], *, samples_per_prompt: int, seed: int, shuffle: bool) -> None:
        """``indices`` are the ``prompt_index`` of the rows that take part, in the order of the file."""
        if not indices:
            raise ValueError("an order needs at least one prompt")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be >= 1, got {samples_per_prompt}")
        self._indices = indices
        self._samples = samples_per_prompt
        self._seed = seed
        self._shuffle = shuffle
        # Tickets under way straddle two epochs at most as long as an epoch is longer than what is under way.
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def epoch_size(self) -> int:
        """Tickets per epoch."""
        return len(self._indices) * self._samples

    def occurrence(self, ticket: int) -> tuple[int, int, int]:
        """(epoch, prompt_index, sample_index) of a ticket ≥ 0. O(1), and O(n log n) once per epoch of n prompts."""
        if ticket < 0:
            raise ValueError(f"tickets are counted from 0, got {ticket}")
        epoch, place = divmod(ticket, self.epoch_size)
        position, sample_index = divmod(place, self._samples)
        if self._shuffle:
            position = int(self._permutation(epoch)[position])
        return epoch, self._indices[position], sample_index

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        found = self._permutations.get(epoch)
        if found is None:
            # Raw Philox words and a stable sort: both are fixed by NumPy's promises, unlike Generator.permutation and
            # random.shuffle, so a run can be resumed under another version.
            words = np.random.Philox(key=stream_key("shuffle", self._seed, epoch)).random_raw(len(self._indices))
            found = np.argsort(words, kind="stable")
            while len(self._permutations) >= 2:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = found
        return found


class PromptSource:
    """Makes the ``Prompt`` of a ticket: row, random stream, and whether it trains on the file's own completion."""

    def __init__(
        self,
        prompts: PromptSet,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        shuffle: bool = True,
        reference_share: float = 0.0,
    ) -> None:
        self.prompts = prompts
        self.order = PromptOrder(prompts.indices, samples_per_prompt=samples_per_prompt, seed=seed, shuffle=shuffle)
        self._seed = seed
        self._reference_share = reference_share

    def make_prompt(self, ticket: int) -> Prompt:
        """The occurrence of ``ticket``; equal tickets give equal prompts, in this process and in a resumed one."""
        epoch, prompt_index, sample_index = self.order.occurrence(ticket)
        row = self.prompts.row(prompt_index)
        identity = (self._seed, epoch, prompt_index, sample_index)
        # A row without a completion is sampled even when the draw says otherwise.
        takes_reference = uniform(stream_key("reference", *identity)) < self._reference_share
        return Prompt(
            rollout_id=ticket,
            epoch=epoch,
            prompt_index=prompt_index,
            sample_index=sample_index,
            token_ids=row.token_ids,
            reference_ids=row.reference_ids if takes_reference else None,
            stream_key=stream_key("sample", *identity),
        )


def load_prompts(
    config: DataConfig, tokenizer: Tokenizer, *, max_reference_tokens: int, name: str = "data", keep_text: bool = True
) -> PromptSet:
    """Read, check and tokenize the rows that ``config`` names. Blocks: reads the whole file once.

    Args:
        max_reference_tokens: a reference completion, its end-of-sequence id included, must fit into this.
        name: which part of the recipe ``config`` is, for errors and log lines: "data" or "evaluation.data".
        keep_text: keep the prompts' texts as well as their tokens.

    Raises:
        DataError: the file is missing, broken, empty or too short, or a row is not as ``config`` says; names file and
            line (JSONL, counted from 1) or row (Parquet, counted from 0). With ``too_long="refuse"`` also when a prompt
            or reference does not fit.
    """
    path = Path(config.path)
    prompts = PromptSet(name=name, path=path)
    num_rows = 0
    first = ""
    for block in _blocks(read_rows(config, name=name)):
        num_rows += len(block)
        complaints = _add_block(prompts, block, config, tokenizer, max_reference_tokens, keep_text=keep_text)
        prompts.num_filtered += len(complaints)
        if complaints and not first:
            first = complaints[0]
    _check_count(path, config, name, num_rows)
    if prompts.num_filtered and config.too_long == "refuse":
        raise DataError(
            f"{path}: {prompts.num_filtered} of {num_rows} rows do not fit, the first is {first}; raise the limit, "
            f'shorten the row, or leave such rows out with {name}.too_long="filter"'
        )
    if prompts.num_filtered:
        log.info(
            "data.filtered",
            name=name,
            path=str(path),
            num_filtered=prompts.num_filtered,
            num_rows=num_rows,
            reason="too_long",
            first=first,
        )
    if not len(prompts):
        raise DataError(f"{path}: all {num_rows} rows were left out, the first is {first}; raise the limit")
    if config.reference_column is not None and prompts.num_references == 0:
        raise DataError(
            f"{path}: no row has a {config.reference_column!r}; correct {name}.reference_column or set it to null"
        )
    return prompts


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder. Reads local files only.

    Raises:
        ModelAbsent: there is no such folder, or no file of a tokenizer in it.
        ModelError: the tokenizer cannot be loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelAbsent(
            f"{path!r}: there is no such folder", remedy="expected a model in Hugging Face format with its tokenizer"
        )
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ModelAbsent(
            f"{path!r} has no tokenizer", remedy="expected a model in Hugging Face format with its tokenizer"
        )
    from transformers import AutoTokenizer  # 2 s to import: a prompt file can be checked without it

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust tokenizer raises bare Exception for a broken tokenizer.json
        raise ModelError(
            f"{path!r}: the tokenizer cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "is tokenizer.json complete?"
        ) from error
    return cast(Tokenizer, tokenizer)


def _blocks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    block: list[RawRow] = []
    for row in rows:
        block.append(row)
        if len(block) == _BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block


def _add_block(
    prompts: PromptSet,
    block: list[RawRow],
    config: DataConfig,
    tokenizer: Tokenizer,
    max_reference_tokens: int,
    *,
    keep_text: bool,
) -> list[str]:
    """Tokenize a block of rows and add to ``prompts`` what fits; returns what is wrong with the others."""
    complaints = []
    prompt_ids = _tokenize_prompts(block, config, tokenizer, name=prompts.name)
    reference_ids = _tokenize_references(block, tokenizer, ends=config.reference_ends)
    for raw, ids, reference in zip(block, prompt_ids, reference_ids, strict=True):
        if not ids:
            raise DataError(f"{raw.where}: {config.prompt_column!r} has no token under this tokenizer")
        if len(ids) > config.max_prompt_tokens:
            complaints.append(f"{raw.where}: {len(ids)} prompt tokens, max_prompt_tokens={config.max_prompt_tokens}")
        elif reference is not None and len(reference) > max_reference_tokens:
            complaints.append(
                f"{raw.where}: {len(reference)} reference tokens, max_reference_tokens={max_reference_tokens}"
            )
        else:
            prompts._add(raw.prompt_index, ids, reference, _display(raw.prompt) if keep_text else None)
    return complaints


def _tokenize_prompts(block: list[RawRow], config: DataConfig, tokenizer: Tokenizer, *, name: str) -> list[list[int]]:
    """A template spells out its own special tokens; a text taken as it is gets those that the tokenizer adds."""
    is_chat = [config.chat or not isinstance(raw.prompt, str) for raw in block]
    templated = [_render(raw, tokenizer, name) for raw, chat in zip(block, is_chat, strict=True) if chat]
    plain = [cast(str, raw.prompt) for raw, chat in zip(block, is_chat, strict=True) if not chat]
    templated_ids = iter(_encode(templated, tokenizer, add_special_tokens=False))
    plain_ids = iter(_encode(plain, tokenizer, add_special_tokens=True))
    return [next(templated_ids) if chat else next(plain_ids) for chat in is_chat]


def _tokenize_references(block: list[RawRow], tokenizer: Tokenizer, *, ends: bool) -> list[list[int] | None]:
    texts = [raw.reference for raw in block if raw.reference is not None]
    if not texts:
        return [None] * len(block)
    end = tokenizer.eos_token_id
    if ends and end is None:
        raise DataError(
            f"{block[0].where}: references end with the end-of-sequence token and the tokenizer has none; set "
            "eos_token in tokenizer_config.json, or reference_ends=false to take them as they stand"
        )
    tail = [end] if ends else []
    encoded = iter(_encode(texts, tokenizer, add_special_tokens=False))
    return [None if raw.reference is None else [*next(encoded), *tail] for raw in block]


def _render(raw: RawRow, tokenizer: Tokenizer, name: str) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{raw.where}: the tokenizer has no chat template; set {name}.chat=false for plain text, or use "
            "a chat model's tokenizer"
        )
    messages = [{"role": "user", "content": raw.prompt}] if isinstance(raw.prompt, str) else raw.prompt
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs: they refuse roles and orders with whatever they like
        raise DataError(f"{raw.where}: the chat template does not take this prompt ({error})") from error
    return cast(str, text)


def _encode(texts: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: "longer than the maximum length" is ours to say, with the line.
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _display(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return cast(str, prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _check_count(path: Path, config: DataConfig, name: str, num_rows: int) -> None:
    if num_rows == 0 and config.first_row == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row")
    if num_rows == 0:
        raise DataError(f"{path}: no row {config.first_row} in the file; lower {name}.first_row={config.first_row}")
    if config.num_rows is not None and num_rows < config.num_rows:
        raise DataError(
            f"{path}: {num_rows} rows from row {config.first_row} on, {name}.num_rows={config.num_rows} asks for more; "
            "lower it, or set it to null for all rows"
        )


def _slice(values: array[int], ends: array[int], position: int) -> tuple[int, ...]:
    start = ends[position - 1] if position else 0
    return tuple(values[start : ends[position]])
