"""The collaborators of a run that more than one actor works with. Made by ``engine.build``, handed to makers of
actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from engine.actor import Caller
from engine.checkpoint import Checkpoint, CheckpointStore
from engine.clock import Clock
from engine.generation.protocol import Generator
from engine.ledger import Ledger
from engine.prompts import PromptSet, Tokenizer
from engine.recipe import Recipe
from engine.run_dir import RunDir
from engine.schedule import Schedule
from engine.training.protocol import Trainer
from engine.types import SamplingParams
from teacher.protocol import Teacher


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    recipe: Recipe
    run_dir: RunDir
    clock: Clock
    tokenizer: Tokenizer
    prompts: PromptSet
    held_out: PromptSet | None
    ledger: Ledger
    schedule: Schedule
    store: CheckpointStore
    checkpoint: Checkpoint | None
    """Where the run continues from."""
    generator: Generator
    trainer: Trainer
    teacher: Teacher
    params: SamplingParams
    learner_worker: Caller
    """The one thread in which the trainer is called."""
    syncer_worker: Caller
    """The thread in which versions are digested on their way out."""
    sampler_spare: int
    """Answers that wait in the generator for a place."""
    teacher_concurrency: int
    """Rollouts at the teacher at a time."""
    most_top_k: int | None = None
    """Largest top_k that the teacher gives, where that is less than the recipe wants."""
    weights_lock: asyncio.Lock
    """Held while weights are read to travel, and while the optimizer changes them."""
    push_weights: Callable[[], Awaitable[None]]
    """Give the generator the learner's present weights."""
    evaluate: Callable[[int], Coroutine[Any, Any, None]] | None = None
    """Instead of measuring the held-out prompts (a simulation has none)."""
    save_checkpoint: Callable[[int], Awaitable[None]] | None = None
    """Instead of writing one."""
