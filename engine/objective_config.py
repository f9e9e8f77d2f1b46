"""What a recipe says of its objective: which divergence, of what parts, and which settings belong to which."""

from __future__ import annotations

from typing import Literal

from engine.errors import RecipeError
from engine.recipe_fields import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section


class DivergenceConfig(Section, frozen=True, kw_only=True):
    """One divergence between student and teacher, per response token (``ops``; docs/objectives.md). Fields that do not
    belong to its kind stay None."""

    kind: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "student_topk_reverse_kl", "sampled_reverse_kl", "mixture"
    ] = "forward_kl"
    tail: Literal["bucket", "renormalise", "ignore"] = "bucket"
    """What happens to probability outside the teacher's top-k ∪ {sampled token}; no choice for the last three kinds."""
    beta: Fraction | None = None
    """jsd: the teacher's share of the mean distribution; 0 is forward KL, 1 reverse KL. None: 0.5."""
    alpha: Fraction | None = None
    """skew_kl: how much of the first distribution is mixed into the second. None: 0.1."""
    reverse: bool | None = None
    """skew_kl: from the student to the mixture. None: false."""
    k: Positive | None = None
    """student_topk_reverse_kl: the teacher is asked about so many ids that the student found most likely when it
    sampled. None: 64."""
    estimator: Literal["k1", "k3"] | None = None
    """sampled_reverse_kl. None: k1."""
    clip_ratio: PositiveFloat | None = None
    """sampled_reverse_kl: the largest importance weight. None: no limit."""

    def __post_init__(self) -> None:
        for field, kind in _FIELD_OF.items():
            if getattr(self, field) is not None and self.kind != kind:
                raise RecipeError(
                    f"objective: {field}={getattr(self, field)!r} belongs to kind={kind!r}, this one is "
                    f"{self.kind!r}; leave {field} out or change the kind"
                )
        if self.tail != "bucket" and self.kind in _WITHOUT_TAIL:
            raise RecipeError(
                f"objective: tail={self.tail!r} has no meaning for kind={self.kind!r}; leave it out"
                + (" and set it in the terms" if self.kind == "mixture" else "")
            )

    @property
    def student_top_k(self) -> int:
        """How many ids that the student found most likely it is about."""
        return (self.k or 64) if self.kind == "student_topk_reverse_kl" else 0


_FIELD_OF = {
    "beta": "jsd",
    "alpha": "skew_kl",
    "reverse": "skew_kl",
    "k": "student_topk_reverse_kl",
    "estimator": "sampled_reverse_kl",
    "clip_ratio": "sampled_reverse_kl",
}
_WITHOUT_TAIL = ("student_topk_reverse_kl", "sampled_reverse_kl", "mixture")


class TermConfig(DivergenceConfig, frozen=True, kw_only=True):
    """One term of a mixture."""

    weight: NonNegativeFloat

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "mixture":
            raise RecipeError("objective.terms: a mixture in a mixture; list its terms with multiplied weights instead")


class ObjectiveConfig(DivergenceConfig, frozen=True, kw_only=True):
    """What is minimised."""

    terms: tuple[TermConfig, ...] = ()
    """mixture: what is added up."""
    temperature: PositiveFloat = 1.0
    """Both models' distributions are brought to it before they are compared."""
    square_temperature: bool = False
    """Multiply by temperature²: gradients then keep their size when it changes."""
    clamp: PositiveFloat | None = None
    """Nats: a token's divergence counts for no more, and one above it is not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "mixture") != bool(self.terms):
            raise RecipeError(
                f"objective: kind={self.kind!r} with {len(self.terms)} terms; a mixture needs at least one, and only a "
                "mixture has any"
            )
        if self.kind == "mixture" and not any(term.weight > 0 for term in self.terms):
            raise RecipeError("objective.terms: all weights are 0, so nothing would be trained; raise one")

    @property
    def parts(self) -> tuple[DivergenceConfig, ...]:
        """The divergences in it."""
        return self.terms or (self,)

    @property
    def num_top_ids(self) -> int:
        """How many ids of the student's own the teacher is asked about at each position."""
        return max(part.student_top_k for part in self.parts)

    @property
    def needs_sampling(self) -> bool:
        """Whether it means something only for answers that the student itself has drawn."""
        return any(part.kind in ("student_topk_reverse_kl", "sampled_reverse_kl") for part in self.parts)
