"""docs/protocol.md tells the truth: its example runs against a real service, its bytes and numbers are the code's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from teacher import wire
from teacher.protocol import PROTOCOL, Scores, TeacherInfo, Values
from tests.support.documents import ROOT, blocks
from tests.teacher.conftest import Service
from tests.teacher.test_wire import GOLDEN_REQUEST

TEXT = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
BLOCKS = list(blocks(Path("docs/protocol.md"), TEXT))


def test_the_client_example_runs_against_a_service(
    start_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = next(block for block in BLOCKS if "TeacherClient" in block.code)
    (tmp_path / "token.txt").write_text("secret\n")
    service = start_service("--token-file", str(tmp_path / "token.txt"), module="tests.teacher.slow_teacher")
    monkeypatch.chdir(tmp_path)
    code = example.code.replace("http://127.0.0.1:8900", service.url)

    exec(compile(code, str(example), "exec"), {"__name__": "__main__"})


def test_the_example_frame_is_the_one_that_is_sent() -> None:
    listing = next(block for block in BLOCKS if block.language == "text")

    assert bytes.fromhex(listing.code) == GOLDEN_REQUEST


def test_header_fields_and_protocol_version_are_the_codes() -> None:
    assert f"Protocol version: **{PROTOCOL}**" in TEXT
    assert f"at most {wire.MAX_HEADER_BYTES}" in TEXT
    for struct in (wire.RequestHeader, wire.AnswerHeader, TeacherInfo):
        for field in msgspec.structs.fields(struct):
            assert f"`{field.name}`" in TEXT, field.name


@pytest.mark.parametrize(
    ("row", "vocab_size", "values"),
    [
        ("up to 65,536 rows, float16", 65_536, "float16"),
        ("up to 2²⁴ rows, float16", 2**24, "float16"),
        ("up to 65,536 rows, float32", 65_536, "float32"),
        ("float32 values and 4-byte ids", 2**25, "float32"),
    ],
)
def test_the_table_of_sizes_is_measured(row: str, vocab_size: int, values: Values) -> None:
    def size(num_response: int) -> int:
        scores = Scores(
            top_ids=np.zeros((num_response, 64), np.int32),
            top_logprobs=np.zeros((num_response, 64), np.float32),
            sampled_logprobs=np.zeros(num_response, np.float32),
        )
        return len(wire.encode_answer(scores, values=values, vocab_size=vocab_size))

    num_bytes = size(2) - size(1)

    assert re.search(rf"\| {re.escape(row)} \| {num_bytes} \| {num_bytes / 516:.0%}".replace("%", " %"), TEXT)
