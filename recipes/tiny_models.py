"""Tiny models of the families that the big recipes are for, made on the spot: what ``--set profile=tiny`` runs on.

    python -m recipes.tiny_models --family qwen3 --out models/tiny/qwen3

    teacher/            random weights, a few layers, 512 tokens
    student/            the teacher without its last layer, every weight a little off: what distillation repairs
    train.parquet       word problems as GSM8K has them: columns ``question`` and ``answer``
    test.parquet        others, held out

They are real folders in Hugging Face format and go through every code path that a big model's folder goes through.
Equal arguments give equal bits. A folder is written aside and renamed: one that is there is whole and is left alone.

This module knows no recipe: what is trained on these, and how, is theirs to say.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["qwen3", "deepseek_v3"]

VOCAB = 512
MAX_LENGTH = 1024
"""Positions: prompt and answer together."""
NUM_TRAIN, NUM_TEST = 192, 32

PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SCALE = 0.15
"""Standard deviation of the teacher's weights: its distributions are far from uniform, as a trained model's are."""
_NOISE = 0.02
"""What is added to each of the student's."""


class TinyWorld(NamedTuple):
    """Where everything lies."""

    student: Path
    teacher: Path
    train: Path
    test: Path


def make(family: Family, folder: Path, *, num_layers: int = 3) -> TinyWorld:
    """Make models and prompts of ``family`` under ``folder``, unless they are there.

    Args:
        num_layers: of the teacher; the student has one less.

    Needs the extra ``parquet``.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        whole = aside / folder.name
        try:
            whole.mkdir()
            _write(family, world_in(whole), num_layers)
            os.rename(whole, folder)
        except OSError:
            # Two at once: both make the same bits, the first one's are kept.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return world_in(folder)


def world_in(folder: Path) -> TinyWorld:
    return TinyWorld(folder / "student", folder / "teacher", folder / "train.parquet", folder / "test.parquet")


def _write(family: Family, world: TinyWorld, num_layers: int) -> None:
    train, test = word_problems(NUM_TRAIN, seed=0), word_problems(NUM_TEST, seed=1)
    for path, rows in ((world.train, train), (world.test, test)):
        write_parquet(path, rows)
    tokenizer = make_tokenizer([text for row in train for text in row.values()])
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    teacher, student = teacher_and_student(CONFIGS[family], num_layers=num_layers)
    for model, path in ((teacher, world.teacher), (student, world.student)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def qwen3(num_layers: int) -> PreTrainedConfig:
    """As Qwen3-0.6B in small: grouped queries, normalised heads, a tied head."""
    from transformers import Qwen3Config

    return Qwen3Config(
        **_common(),
        num_hidden_layers=num_layers,
        hidden_size=128,
        intermediate_size=256,
        # vLLM's attention on CPU begins at 32 numbers per head.
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )


def deepseek_v3(num_layers: int) -> PreTrainedConfig:
    """As Moonlight in small: latent attention without a query projection of its own, a first dense layer, then eight
    experts of which two are asked, chosen with a bias, and a shared one. A head of its own. The widths of an attention
    head are those of the big model: kernels are made for no others."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        # As the files of such models say, transformers does not ask, and vLLM does.
        **(_common() | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
        num_hidden_layers=num_layers,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        rope_interleave=True,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        tie_word_embeddings=False,
    )


CONFIGS: Mapping[Family, Callable[[int], PreTrainedConfig]] = {"qwen3": qwen3, "deepseek_v3": deepseek_v3}


def teacher_and_student(
    config: Callable[[int], PreTrainedConfig], *, num_layers: int = 3, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher has ``num_layers``, the student all but the last of them, and noise."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        teacher, student = (
            AutoModelForCausalLM.from_config(config(layers), dtype=torch.float32)  # type: ignore[no-untyped-call]
            for layers in (num_layers, num_layers - 1)
        )
        student.load_state_dict(
            {name: tensor for name, tensor in teacher.state_dict().items() if name in student.state_dict()}
        )
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    for model in (teacher, student):
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=None, eos_token_id=END_ID, pad_token_id=PAD_ID
        )
    return teacher, student


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 512 tokens and the chat template of the Qwen family; any text survives it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "system user assistant"], trainer)
    # A vocabulary as large as the output layer, whatever the texts yield.
    tokenizer.add_tokens([f"<|spare_{number}|>" for number in range(VOCAB - tokenizer.get_vocab_size())])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def word_problems(number: int, *, seed: int) -> list[dict[str, str]]:
    """``question`` and ``answer`` in the manner of GSM8K: reasoning, then ``#### `` and the number."""
    random_one = random.Random(seed)
    rows = []
    for _ in range(number):
        name, thing = random_one.choice(_NAMES), random_one.choice(_THINGS)
        first, each, days = random_one.randint(2, 60), random_one.randint(2, 12), random_one.randint(2, 9)
        more, total = each * days, first + each * days
        rows.append(
            {
                "question": f"{name} has {first} {thing} and buys {each} more every day for {days} days. "
                f"How many {thing} does {name} have then?",
                "answer": f"{name} buys {each} * {days} = <<{each}*{days}={more}>>{more} {thing}. "
                f"Together that is {first} + {more} = <<{first}+{more}={total}>>{total} {thing}.\n#### {total}",
            }
        )
    return rows


_NAMES = ("Ada", "Bela", "Chiara", "Dario", "Elif", "Farid", "Gita", "Hugo", "Ines", "Jomo", "Keiko", "Lars")
_THINGS = ("apples", "books", "cards", "eggs", "lamps", "maps", "pens", "shells", "stamps", "tiles")


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": _SCALE,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_models", description="Tiny models and prompts.")
    parser.add_argument("--family", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    make(arguments.family, arguments.out)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
