"""A prompt file is read as it is or refused with its line; the order of a run is a function of its arguments."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import msgspec
import pyarrow
import pyarrow.parquet
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError, ModelError
from engine.prompts import PromptOrder, PromptSet, PromptSource, Tokenizer, load_prompts, load_tokenizer
from engine.recipe import DataConfig
from engine.streams import stream_key
from tests.support.models import EOS_ID, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer in it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


def config(path: Path, **changes: Any) -> DataConfig:
    """Checked as a recipe is."""
    return msgspec.convert({"path": str(path), **changes}, DataConfig)


def load(path: Path, tokenizer: Tokenizer, *, max_reference_tokens: int = 64, **changes: Any) -> PromptSet:
    return load_prompts(config(path, **changes), tokenizer, max_reference_tokens=max_reference_tokens, name="data")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@KINDS
def test_a_string_becomes_one_user_message(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = write(tmp_path / f"p.{kind}", [{"prompt": "Why is the sky blue?"}, {"prompt": "naïve 日本 🙂"}])
    first, second = load(path, tokenizer)
    assert tokenizer.decode(first.token_ids, skip_special_tokens=False) == (
        "<|bos|>user\nWhy is the sky blue?<|eos|>\n<|bos|>assistant\n"
    )
    assert (first.prompt_index, first.text, first.reference_ids) == (0, "Why is the sky blue?", None)
    assert second.text == "naïve 日本 🙂"


@KINDS
def test_messages_keep_their_roles(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(tmp_path / f"p.{kind}", [{"chat": messages}])
    (row,) = load(path, tokenizer, prompt_column="chat")
    assert tokenizer.decode(row.token_ids, skip_special_tokens=False) == (
        "<|bos|>system\nBe brief.<|eos|>\n<|bos|>user\nHi<|eos|>\n<|bos|>assistant\n"
    )
    assert row.text == "system: Be brief.\nuser: Hi"


def test_the_template_gives_the_tokens_that_transformers_gives(tmp_path: Path, folder: Path) -> None:
    """We render texts and tokenize them in blocks; the library's own one-step way is the reference."""
    tokenizer = cast(Any, load_tokenizer(str(folder)))
    texts = [f"prompt <|eos|> number {n}\n" for n in range(700)]  # more than a block
    prompts = load(write(tmp_path / "p.jsonl", [{"prompt": text} for text in texts]), tokenizer)
    for text, row in zip(texts, prompts, strict=True):
        messages = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert list(row.token_ids) == expected


def test_without_chat_a_text_is_taken_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "Once upon a"}])
    (row,) = load(path, tokenizer, chat=False)
    assert tokenizer.decode(row.token_ids, skip_special_tokens=False) == "Once upon a"


@KINDS
def test_a_reference_ends_with_the_end_of_sequence(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = write(tmp_path / f"p.{kind}", [{"prompt": "a", "answer": "Because."}, {"prompt": "b", "answer": None}])
    prompts = load(path, tokenizer, reference_column="answer")
    first, second = prompts
    assert first.reference_ids is not None
    assert tokenizer.decode(first.reference_ids[:-1], skip_special_tokens=False) == "Because."
    assert first.reference_ids[-1] == EOS_ID
    assert second.reference_ids is None
    assert prompts.num_references == 1


def test_a_reference_that_was_cut_off_does_not_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "Because of"}])
    (row,) = load(path, tokenizer, reference_column="answer", reference_ends=False)
    assert row.reference_ids is not None
    assert tokenizer.decode(row.reference_ids, skip_special_tokens=False) == "Because of"


@KINDS
def test_only_the_rows_asked_for_are_read(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = write(tmp_path / f"p.{kind}", [{"prompt": f"row {n}"} for n in range(1300)])
    prompts = load(path, tokenizer, first_row=1020, num_rows=3)
    assert [(row.prompt_index, row.text) for row in prompts] == [(n, f"row {n}") for n in (1020, 1021, 1022)]
    assert len(load(path, tokenizer, first_row=1299)) == 1
    with pytest.raises(DataError, match=r"no row 1300 in the file; lower data.first_row=1300"):
        load(path, tokenizer, first_row=1300)
    with pytest.raises(DataError, match=r"1 rows from row 1299 on, data.num_rows=5 asks for more"):
        load(path, tokenizer, first_row=1299, num_rows=5)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n   \n\n{"prompt": "b"}')
    assert [(row.prompt_index, row.text) for row in load(path, tokenizer)] == [(0, "a"), (1, "b")]


def test_texts_need_not_be_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    prompts = load_prompts(config(path), tokenizer, max_reference_tokens=8, keep_text=False)
    assert prompts.row(0).text == ""


GOOD = b'{"prompt": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nonsense", r"p.jsonl:3: not JSON"),
        (b'{"prompt": "a"} trailing', r"p.jsonl:3: not JSON"),
        (b'{"prompt": ' + b"[" * 100_000, r"p.jsonl:3: not JSON"),
        (b'{"prompt": "\\ud800"}', r"p.jsonl:3: not JSON"),
        (b'{"prompt": "\xff\xfe"}', r"p.jsonl:3: not UTF-8"),
        (b"\x00\x01\x02", r"p.jsonl:3: not JSON"),
        (b'"just a string"', r"p.jsonl:3: a string; expected one object per line"),
        (b"[1, 2]", r"p.jsonl:3: a list; expected one object"),
        (b"null", r"p.jsonl:3: null; expected one object"),
        (b'{"text": "a", "id": 4}', r"p.jsonl:3: no 'prompt' \(set data.prompt_column\); the row has 'text', 'id'"),
        (b"{}", r"p.jsonl:3: no 'prompt' .* the row has no column"),
        (b'{"prompt": 5}', r"p.jsonl:3: 'prompt' is a number; expected a string or a list"),
        (b'{"prompt": null}', r"p.jsonl:3: 'prompt' is null"),
        (b'{"prompt": true}', r"p.jsonl:3: 'prompt' is a boolean"),
        (b'{"prompt": {"role": "user"}}', r"p.jsonl:3: 'prompt' is an object"),
        (b'{"prompt": "  \\n"}', r"p.jsonl:3: 'prompt' is empty"),
        (b'{"prompt": []}', r"p.jsonl:3: 'prompt' is an empty list"),
        (b'{"prompt": ["hi"]}', r"p.jsonl:3: message 0 of 'prompt' is a string; expected \{"),
        (
            b'{"prompt": [{"role": "user"}]}',
            r"p.jsonl:3: message 0 of 'prompt': 'content' is missing; expected a string",
        ),
        (b'{"prompt": [{"role": 1, "content": "a"}]}', r"p.jsonl:3: message 0 of 'prompt': 'role' is a number"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}]}', r"p.jsonl:3: the last message .* is the assistant's"),
        (b'{"prompt": "a", "answer": 3}', r"p.jsonl:3: 'answer' is a number; expected a string, or null"),
        (b'{"prompt": "a", "answer": " "}', r"p.jsonl:3: 'answer' is empty; use null"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=message):
        load(path, tokenizer, reference_column="answer")


@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_once: Tokenizer, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"random\.jsonl"):
        load(path, tokenizer_once)


@pytest.fixture(scope="module")
def tokenizer_once(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], r"p.parquet row 1: 'prompt' is empty"),
        ([{"prompt": "a"}, {"prompt": None}], r"p.parquet row 1: 'prompt' is null"),
        ([{"prompt": 1.5}], r"p.parquet row 0: 'prompt' is a number"),
        ([{"text": "a", "id": 1}], r"p.parquet: no column 'prompt'; the columns are 'text', 'id'"),
        ([{"prompt": [{"role": "user"}]}], r"p.parquet row 0: message 0 of 'prompt': 'content' is missing"),
    ],
)
def test_a_bad_parquet_row_is_named(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "p.parquet", rows), tokenizer)


def test_a_parquet_text_that_is_not_utf_8_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "caf~"} for _ in range(3)])
    # Snappy and a dictionary keep so short a text as it is; with statistics it is there more than once.
    path.write_bytes(path.read_bytes().replace(b"caf~", b"caf\xe9"))

    with pytest.raises(DataError, match=r"p.parquet: a text in rows 0 to 2 is not UTF-8"):
        load(path, tokenizer)


def test_a_broken_parquet_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "text " * 50 + str(n)} for n in range(2000)])
    whole = path.read_bytes()
    for broken in (b"", b"not parquet", whole[:-10], b"PAR1" + bytes(2000) + whole[2004:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"p.parquet: (not a Parquet file that can be read|cannot be read)"):
            load(path, tokenizer)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="the file is empty"):
        load(path, tokenizer)


def test_a_path_that_is_no_prompt_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data.path=.*nowhere.jsonl': there is no such file"):
        load(tmp_path / "nowhere.jsonl", tokenizer)
    with pytest.raises(DataError, match="is a folder"):
        load(tmp_path, tokenizer)
    (tmp_path / "p.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"unknown kind of file '.csv'; expected .jsonl or .parquet"):
        load(tmp_path / "p.csv", tokenizer)


def test_rows_that_do_not_fit_stop_the_run_or_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "ok"},
        {"prompt": "x" * 200},
        {"prompt": "ok", "answer": "y" * 90},
        {"prompt": "ok", "answer": "z"},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    limits: dict[str, Any] = {"max_prompt_tokens": 60, "max_reference_tokens": 40, "reference_column": "answer"}
    with pytest.raises(
        DataError,
        match=r"2 of 4 rows do not fit, the first is .*p.jsonl:2: \d+ prompt tokens, max_prompt_tokens=60; .*"
        r'data.too_long="filter"',
    ):
        load(path, tokenizer, **limits)
    with structlog.testing.capture_logs() as lines:
        prompts = load(path, tokenizer, too_long="filter", **limits)
    assert [row.prompt_index for row in prompts] == [0, 3]
    assert prompts.num_filtered == 2
    assert [(line["event"], line["num_filtered"], line["num_rows"]) for line in lines] == [("data.filtered", 2, 4)]
    with pytest.raises(KeyError, match=r"row 1 of .* is not among the 2 usable rows"):
        prompts.row(1)
    assert prompts.row(3).text == "ok"
    with pytest.raises(DataError, match="all 4 rows were left out"):
        load(path, tokenizer, too_long="filter", **limits | {"max_prompt_tokens": 2})


def test_the_limit_itself_fits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "abc", "answer": "xyz"}])
    (row,) = load(path, tokenizer, reference_column="answer")
    assert row.reference_ids is not None
    exact = {"max_prompt_tokens": len(row.token_ids), "max_reference_tokens": len(row.reference_ids)}
    assert len(load(path, tokenizer, reference_column="answer", **exact)) == 1
    for name in exact:
        with pytest.raises(DataError, match="do not fit"):
            load(path, tokenizer, reference_column="answer", **exact | {name: exact[name] - 1})


def test_a_reference_column_that_no_row_has_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no row has a 'anwser'; correct data.reference_column"):
        load(write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}]), tokenizer, reference_column="anwser")
    with pytest.raises(DataError, match="no column 'anwser'; the columns are 'prompt', 'answer'"):
        load(write(tmp_path / "p.parquet", [{"prompt": "a", "answer": "b"}]), tokenizer, reference_column="anwser")


def test_a_tokenizer_that_lacks_what_the_recipe_asks_is_named(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}])
    plain = cast(Any, load_tokenizer(str(folder)))
    plain.chat_template = None
    with pytest.raises(DataError, match=r"p.jsonl:1: the tokenizer has no chat template; set data.chat=false"):
        load(path, plain)
    assert len(load(path, plain, chat=False)) == 1
    plain.eos_token = None
    with pytest.raises(DataError, match="references end with the end-of-sequence token"):
        load(path, plain, chat=False, reference_column="answer")
    assert load(path, plain, chat=False, reference_column="answer", reference_ends=False).num_references == 1
    strict = cast(Any, load_tokenizer(str(folder)))
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"p.jsonl:1: the chat template does not take this prompt \(roles must alternate"
    ):
        load(path, strict)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "broken')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_the_digest_follows_everything_a_ticket_means(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"row {n}", "answer": f"answer {n}"} for n in range(4)]
    path = write(tmp_path / "p.jsonl", rows)
    same = load(path, tokenizer).digest
    assert load(write(tmp_path / "q.parquet", rows), tokenizer).digest == same
    others = {
        load(path, tokenizer, reference_column="answer").digest,
        load(path, tokenizer, first_row=1).digest,
        load(path, tokenizer, num_rows=3).digest,
        load(path, tokenizer, chat=False).digest,
        load(write(tmp_path / "r.jsonl", rows[::-1]), tokenizer).digest,
    }
    assert len(others | {same}) == 6


# The order.

INDICES = st.lists(st.integers(0, 1000), min_size=1, max_size=40, unique=True).map(sorted)


@given(
    indices=INDICES, samples=st.integers(1, 4), seed=st.integers(-5, 5), shuffle=st.booleans(), epoch=st.integers(0, 3)
)
def test_each_epoch_has_every_sample_of_every_prompt_once_and_together(
    indices: list[int], samples: int, seed: int, shuffle: bool, epoch: int
) -> None:
    order = PromptOrder(indices, samples_per_prompt=samples, seed=seed, shuffle=shuffle)
    first = epoch * order.epoch_size
    occurrences = [order.occurrence(ticket) for ticket in range(first, first + order.epoch_size)]
    assert {one[0] for one in occurrences} == {epoch}
    assert Counter(one[1:] for one in occurrences) == Counter((i, s) for i in indices for s in range(samples))
    assert [one[2] for one in occurrences] == list(range(samples)) * len(indices)
    groups = [occurrences[start : start + samples] for start in range(0, len(occurrences), samples)]
    assert all(len({one[1] for one in group}) == 1 for group in groups)
    if not shuffle:
        assert [group[0][1] for group in groups] == indices


@given(indices=INDICES, seed=st.integers(0, 5), tickets=st.lists(st.integers(0, 300), max_size=30))
def test_a_ticket_means_the_same_whenever_and_wherever_it_is_asked(
    indices: list[int], seed: int, tickets: list[int]
) -> None:
    """A resumed run asks a new order, from the middle, for tickets of several epochs in any sequence."""
    whole = PromptOrder(indices, samples_per_prompt=2, seed=seed, shuffle=True)
    straight = [whole.occurrence(ticket) for ticket in range(301)]
    resumed = PromptOrder(indices, samples_per_prompt=2, seed=seed, shuffle=True)
    assert [resumed.occurrence(ticket) for ticket in tickets] == [straight[ticket] for ticket in tickets]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch_of(seed: int, epoch: int) -> list[int]:
        order = PromptOrder(range(50), samples_per_prompt=1, seed=seed, shuffle=True)
        return [order.occurrence(50 * epoch + place)[1] for place in range(50)]

    orders = [epoch_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # Frozen: another order under another NumPy would make a resumed run train other prompts.
    assert epoch_of(0, 0)[:10] == [5, 10, 48, 14, 2, 34, 47, 44, 30, 26]


def test_an_order_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptOrder([], samples_per_prompt=1, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="samples_per_prompt must be >= 1"):
        PromptOrder([1], samples_per_prompt=0, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="counted from 0"):
        PromptOrder([1], samples_per_prompt=1, seed=0, shuffle=True).occurrence(-1)


@pytest.fixture
def prompts(tmp_path: Path, tokenizer: Tokenizer) -> PromptSet:
    """Rows 0 … 199; every tenth has no reference."""
    rows = [{"prompt": f"row {n}", "answer": None if n % 10 == 0 else f"answer {n}"} for n in range(200)]
    return load(write(tmp_path / "p.jsonl", rows), tokenizer, reference_column="answer")


def test_a_prompt_carries_its_row_and_a_stream_of_its_own(prompts: PromptSet) -> None:
    source = PromptSource(prompts, seed=3, samples_per_prompt=2)
    made = [source.make_prompt(ticket) for ticket in range(2 * source.order.epoch_size)]
    assert len({prompt.stream_key for prompt in made}) == len(made)
    assert [prompt.rollout_id for prompt in made] == list(range(len(made)))
    prompt = made[401]
    assert (prompt.epoch, prompt.sample_index) == (1, 1)
    assert prompt.token_ids == prompts.row(prompt.prompt_index).token_ids
    assert prompt.stream_key == stream_key("sample", 3, 1, prompt.prompt_index, 1)
    assert prompt.reference_ids is None
    assert PromptSource(prompts, seed=3, samples_per_prompt=2).make_prompt(401) == prompt


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_references_is_the_recipes(prompts: PromptSet, share: float) -> None:
    source = PromptSource(prompts, seed=0, samples_per_prompt=5, reference_share=share)
    made = [source.make_prompt(ticket) for ticket in range(source.order.epoch_size)]
    with_reference = [prompt for prompt in made if prompt.prompt_index % 10 != 0]
    taken = sum(prompt.reference_ids is not None for prompt in with_reference)
    deviation = (share * (1 - share) / len(with_reference)) ** 0.5
    assert abs(taken / len(with_reference) - share) <= 4 * deviation
    assert all(prompt.reference_ids is None for prompt in made if prompt.prompt_index % 10 == 0)
    assert all(
        prompt.reference_ids == prompts.row(prompt.prompt_index).reference_ids
        for prompt in made
        if prompt.reference_ids is not None
    )
