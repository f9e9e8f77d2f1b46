"""What the settings of a recipe are made of: numbers with bounds, words with choices, and the base of every section."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_MOST = 1 << 40
"""Of what is counted: a number with too many zeros is a slip, and should be told before it fills memory or SQLite's 64
bits."""
Positive = Annotated[int, Meta(ge=1, le=_MOST)]
NonNegative = Annotated[int, Meta(ge=0, le=_MOST)]
Threads = Annotated[int, Meta(ge=1, le=4096)]
Slots = Annotated[int, Meta(ge=1, le=1 << 20)]
Rollouts = Annotated[int, Meta(ge=1, le=1 << 24)]
Staleness = Annotated[int, Meta(ge=0, le=1024)]
"""Flow looks at each version up to a deadline."""
PositiveFloat = Annotated[float, Meta(gt=0.0, le=1e300)]
"""Not infinity."""
NonNegativeFloat = Annotated[float, Meta(ge=0.0, le=1e300)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Meta(ge=0.0, lt=1.0)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
StepSeconds = Annotated[float, Meta(ge=1e-9, le=1e9)]
"""Not 0: in no time, no end of tokens."""
Port = Annotated[int, Meta(ge=0, le=65535)]
Dtype = Literal["float32", "bfloat16", "float16"]
MasterDtype = Literal["float32", "bfloat16"]
"""Of weights that an optimizer changes. Not float16: AdamW's eps and the squares of small gradients are 0 in it, and
the first step ends the model."""
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""auto: bfloat16 where the device multiplies it in hardware (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), float32
elsewhere."""
Autocast = Literal["auto", "gpu", "off"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a recipe: immutable, keyword-only, no field unknown."""
