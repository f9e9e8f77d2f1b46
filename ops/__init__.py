"""Distillation objectives for torch: values and gradients, from logits or fused with the head. Imports torch only."""

from ops.divergence import Divergence, divergence
from ops.linear import linear_divergence, linear_divergence_with_gradients
from ops.objectives import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
)
from ops.reference import reference_divergence
from ops.scores import TeacherScores

__all__ = [
    "JSD",
    "Divergence",
    "ForwardKL",
    "Mixture",
    "Objective",
    "ReverseKL",
    "SampledReverseKL",
    "SkewKL",
    "StudentTopKReverseKL",
    "TeacherScores",
    "divergence",
    "linear_divergence",
    "linear_divergence_with_gradients",
    "reference_divergence",
]
