"""Tiny causal language models and tokenizers: real ones in Hugging Face format, made on the spot in a few milliseconds.

They are random: what they say is noise, but every code path that a real folder goes through, they go through as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

Arch = Literal["llama", "qwen3", "gpt2", "deepseek_v3"]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
"""The same in every tokenizer made here."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)

_SENTENCES = (
    "The river runs from the hills to the sea, and the sea gives it back as rain.",
    "Why does bread rise? Yeast eats the sugar and makes a gas that fills the dough.",
    "A clock counts the hours; a good friend makes you forget them.",
    "List three facts about the moon: it is round, it is far away, and it is quiet.",
    "user assistant system: explain in one sentence how a bridge carries its load.",
    "Numbers 0 1 2 3 4 5 6 7 8 9 and signs such as + - * / = ( ) are tokens too.",
)


def tiny_tokenizer(folder: Path, *, vocab: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, saved so that ``AutoTokenizer`` loads it.

    Any text survives encoding and decoding. Ids 0, 1 and 2 are pad, bos and eos; nothing is added around a plain text.

    Args:
        vocab: tokens in all, at least 259 (256 bytes and three special tokens). The six sentences that it is trained on
            yield 454 at most; beyond that, unused tokens ``<|spare_n|>`` fill up.
    """
    if vocab < 259:
        raise ValueError(f"256 bytes and 3 special tokens need a vocabulary of at least 259, got {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    missing = vocab - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|spare_{n}|>" for n in range(missing)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return fast


def tiny_model(
    folder: Path,
    *,
    arch: Arch = "llama",
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int | None = None,
    max_positions: int = 512,
    tied: bool = True,
    seed: int = 0,
    scale: float = 0.2,
) -> Path:
    """A random model with tokenizer and generation config, saved under ``folder`` (made when it is not there).

    Equal arguments give equal bits. The caller's global random state is left as it was.

    Args:
        vocab: rows of the output layer; None: the tokenizer's 384. Rows beyond that are padding, as real models have.
        kv_heads: groups of keys and values (not used by gpt2 and deepseek_v3).
        scale: standard deviation of the weights. 0.2 gives distributions that are far from uniform and differ clearly
            between seeds; the usual 0.02 would make every model of this size say the same.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = len(tiny_tokenizer(folder, vocab=384 if vocab is None else min(vocab, 384)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(
            arch,
            vocab_size=size if vocab is None else vocab,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            max_positions=max_positions,
            tied=tied,
            scale=scale,
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)
    return folder


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in ``folder`` on CPU, in evaluation mode."""
    # Experts one by one: what computes them together knows no float64.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    model.eval()  # type: ignore[no-untyped-call]
    return model


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """[L, V] float32 logits of one sequence in one forward pass without a cache: the reference for everything clever.

    Row i is the distribution of the token after ``ids[: i + 1]``.
    """
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0].float()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One JSON object per line, as prompt files are."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _config(
    arch: Arch,
    *,
    vocab_size: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    max_positions: int,
    tied: bool,
    scale: float,
) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": scale,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if arch == "gpt2":
        return GPT2Config(
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            n_positions=max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    if arch == "deepseek_v3":
        return _moe_config(common, hidden=hidden, layers=layers, heads=heads, max_positions=max_positions)
    common |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": max_positions,
    }
    return Qwen3Config(**common) if arch == "qwen3" else LlamaConfig(**common)


def _moe_config(
    common: dict[str, Any], *, hidden: int, layers: int, heads: int, max_positions: int
) -> DeepseekV3Config:
    """As Moonlight: latent attention without a query projection of its own, a first dense layer, then eight experts of
    which two are asked, and a shared one. The widths of a head are those that kernels are made for."""
    return DeepseekV3Config(
        # As the files of such models say, transformers does not ask, and vLLM does.
        **(common | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=max_positions,
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        rope_interleave=True,
    )
