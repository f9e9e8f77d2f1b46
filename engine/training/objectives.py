"""Which of ``ops``' objectives a recipe means."""

from __future__ import annotations

from engine.objective_config import DivergenceConfig, ObjectiveConfig
from ops import (
    JSD,
    ForwardKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    StudentTopKReverseKL,
)


def make_objective(config: ObjectiveConfig) -> Objective:
    if config.kind == "mixture":
        return Mixture(*((term.weight, _divergence(term)) for term in config.terms))
    return _divergence(config)


def _divergence(config: DivergenceConfig) -> Objective:
    match config.kind:
        case "forward_kl":
            return ForwardKL(tail=config.tail)
        case "reverse_kl":
            return ReverseKL(tail=config.tail)
        case "jsd":
            return JSD(beta=0.5 if config.beta is None else config.beta, tail=config.tail)
        case "skew_kl":
            alpha = 0.1 if config.alpha is None else config.alpha
            return SkewKL(alpha=alpha, reverse=bool(config.reverse), tail=config.tail)
        case "student_topk_reverse_kl":
            return StudentTopKReverseKL(config.student_top_k)
        case "sampled_reverse_kl":
            return SampledReverseKL(estimator=config.estimator or "k1", clip_ratio=config.clip_ratio)
        case "mixture":
            raise AssertionError("a mixture has no mixtures in it: engine.recipe refuses them")
