"""``python -m tests.teacher.slow_teacher``: the service with a model that takes its time and needs no torch.

For tests of signals, ends and loads: everything but the scores is the real thing.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence

import numpy as np

from teacher import __main__ as service
from teacher.protocol import ScoreRequest, Scores, TeacherInfo

BATCH_S = 0.03


class SlowBackend:
    """Every batch takes ``BATCH_S``; all tokens have probability 1."""

    def __init__(self, _: argparse.Namespace) -> None:
        self.info = TeacherInfo(
            model="slow",
            vocab_size=384,
            tokenizer_size=384,
            tokenizer_fingerprint="",
            max_length=512,
            max_top_k=8,
            protocol=1,
        )
        self._never = threading.Event()

    def load(self) -> None: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        self._never.wait(BATCH_S)
        return [
            Scores(
                top_ids=np.zeros((len(request.response_ids), request.top_k), np.int32),
                top_logprobs=np.zeros((len(request.response_ids), request.top_k), np.float32),
                sampled_logprobs=np.zeros(len(request.response_ids), np.float32),
                extra_logprobs=None if request.extra_ids is None else np.zeros(request.extra_ids.shape, np.float32),
            )
            for request in requests
        ]


if __name__ == "__main__":
    service._LateBackend = SlowBackend  # type: ignore[assignment,misc]
    sys.exit(service.main())
