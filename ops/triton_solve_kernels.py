"""Device code on the few columns of a row that an objective looks at, in Triton: what ``ops.triton_solve`` launches.

    B rows, one per program      K teacher's top-k      C = K + 1 columns of the support, then the tail: a lane each

The formulas are those of ``ops.coarse``, ``ops.solve`` and ``ops.listed``, in float64 as there. All floats that may not
be rounded to float32 are compile-time constants: Triton hands over others in 32 bits.
"""

# mypy: ignore-errors
# Parameters are pointers and compile-time constants, of which mypy knows nothing.

import triton
import triton.language as tl

from ops.formulas import tail_index
from ops.triton_terms import finite, log_or_minus_inf, term

RENORMALISE = tl.constexpr(tail_index("renormalise"))
IGNORE = tl.constexpr(tail_index("ignore"))


@triton.jit
def make_support(
    top_ids,
    top_ids_stride,
    top_logprobs,
    top_logprobs_stride,
    sampled_ids,
    sampled_logprobs,
    ids,
    logprobs,
    is_valid,
    num_top,
    vocab_size,
    LANES: tl.constexpr,
):
    """One row of ``ops.scores.Support``: ids [B, C] int64, logprobs [B, C] float64; and is_valid [B] bool."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, LANES)
    is_top = at < num_top
    own_ids = tl.load(top_ids + row * top_ids_stride + at, mask=is_top, other=-1).to(tl.int64)
    own_logprobs = tl.load(top_logprobs + row * top_logprobs_stride + at, mask=is_top, other=0.0).to(tl.float64)
    sampled_id = tl.load(sampled_ids + row).to(tl.int64)
    sampled_logprob = tl.load(sampled_logprobs + row).to(tl.float64)
    is_repeated = tl.sum((is_top & (own_ids == sampled_id)).to(tl.int32)) > 0
    is_sampled = at == num_top
    own_ids = tl.where(is_sampled & (not is_repeated), sampled_id, own_ids)
    own_logprobs = tl.where(is_sampled, sampled_logprob, own_logprobs)
    tl.store(is_valid + row, tl.max(own_ids) < vocab_size)
    is_absent = (own_ids < 0) | (own_logprobs == float("-inf"))
    inside = at <= num_top
    tl.store(ids + row * (num_top + 1) + at, tl.where(is_absent, -1, own_ids), mask=inside)
    tl.store(logprobs + row * (num_top + 1) + at, tl.where(is_absent, float("-inf"), own_logprobs), mask=inside)


@triton.jit
def solve_row(
    logits,
    logits_stride,
    support_logits,
    tail_max,
    tail_sum,
    largest,
    num_largest,
    ids,
    logprobs,
    sampled_ids,
    token_weights,
    values,
    metrics,
    tail_shift,
    tail_scale,
    support_gradient,
    num_rows,
    num_ids,
    KIND: tl.constexpr,
    SHARE: tl.constexpr,
    LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
    TAIL: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    FACTOR: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
):
    """One row: value, metrics [6, B] in the order of ``ops.solved.METRICS``, and what ``expand`` needs.

    support_logits [B, C], tail_max, tail_sum [B], largest [B, num_largest] as ``reduce`` gives them; ids, logprobs
    [B, C] of ``make_support``. LOG_FLOOR, CLAMP: None where there is none.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, LANES)
    inside, is_tail, is_top = at < num_ids, at == num_ids, at < num_ids - 1
    own_ids = tl.load(ids + row * num_ids + at, mask=inside, other=-1)
    given = tl.load(logprobs + row * num_ids + at, mask=inside, other=float("-inf"))
    z = tl.load(support_logits + row * num_ids + at, mask=inside, other=float("-inf"))
    shift = finite(tl.load(tail_max + row).to(tl.float64))
    total = tl.load(tail_sum + row).to(tl.float64)
    sampled_id = tl.load(sampled_ids + row).to(tl.int64)
    sampled_logit = tl.load(logits + row * logits_stride + sampled_id, mask=sampled_id >= 0, other=0.0)

    # The student, and the teacher on the same categories.
    log_q, lse = _log_softmax(tl.where(is_tail, log_or_minus_inf(total) + shift, z.to(tl.float64)))
    raw_log_p = tl.where(log_q == float("-inf"), float("-inf"), given)
    mass = tl.sum(tl.exp(raw_log_p))
    has_tail = tl.sum((is_tail & (log_q != float("-inf"))).to(tl.int32)) > 0
    tail_p = tl.where(has_tail & (mass < 1.0), 1.0 - mass, 0.0)
    log_p = tl.where(is_tail, log_or_minus_inf(tail_p), raw_log_p) - finite(log_or_minus_inf(mass + tail_p))

    # What the metrics say is of this; a column is among the student's n largest when fewer than n are larger.
    larger = _num_larger(z, largest + row * num_largest, num_largest, LANES, STEP)
    larger += _num_larger(z, support_logits + row * num_ids, num_ids, LANES, STEP)
    is_named = is_top & (own_ids >= 0)
    num_named = tl.sum(is_named.to(tl.int32))
    num_shared = tl.sum((is_named & (larger < num_named)).to(tl.int32))
    out = metrics + row
    kind = metrics.dtype.element_ty
    tl.store(out, tl.sum(tl.where(is_top, tl.exp(given), 0.0)).to(kind))
    tl.store(out + num_rows, tl.sum(tl.where(is_top, tl.exp(log_q), 0.0)).to(kind))
    tl.store(out + 2 * num_rows, num_shared.to(kind) / tl.maximum(num_named, 1).to(kind))
    tl.store(out + 3 * num_rows, -tl.sum(tl.exp(log_p) * finite(log_p)).to(kind))
    tl.store(out + 4 * num_rows, -tl.sum(tl.exp(log_q) * finite(log_q)).to(kind))
    sampled = tl.where(sampled_id >= 0, sampled_logit.to(tl.float64) - finite(lse), 0.0)
    tl.store(out + 5 * num_rows, sampled.to(kind))

    if TEMPERATURE != 1.0:
        log_p, _ = _log_softmax(log_p / TEMPERATURE)
        log_q, _ = _log_softmax(log_q / TEMPERATURE)
        raw_log_p = log_p
    q = tl.exp(log_q)
    if TAIL == IGNORE:
        log_p, log_q = tl.where(is_tail, float("-inf"), raw_log_p), tl.where(is_tail, float("-inf"), log_q)
        summands, weight = term(log_p, log_q, KIND, SHARE, LOG_SHARE, LOG_REST, False)
        mean = tl.sum(weight)  # the softmax runs over the whole vocabulary though the sum does not
    else:
        if TAIL == RENORMALISE:
            log_p, _ = _log_softmax(tl.where(is_tail, float("-inf"), log_p))
            log_q, _ = _log_softmax(tl.where(is_tail, float("-inf"), log_q))
            q = tl.exp(log_q)
        if LOG_FLOOR is not None:
            log_p = tl.where(
                is_tail & (log_q != float("-inf")), tl.maximum(log_p, tl.full([], LOG_FLOOR, tl.float64)), log_p
            )
        summands, weight = term(log_p, log_q, KIND, SHARE, LOG_SHARE, LOG_REST, True)
        mean = tl.sum(weight) / tl.maximum(tl.sum(q), 0.5)
    value = tl.sum(summands)
    gradient = weight - q * mean

    scale = tl.full([], 1.0, tl.float64)
    if TEMPERATURE != 1.0:
        gradient = gradient / TEMPERATURE
    value, scale = value * FACTOR, scale * FACTOR
    if CLAMP is not None:
        scale = tl.where(value > CLAMP, 0.0, scale)
        value = tl.where(value > CLAMP, tl.full([], CLAMP, tl.float64), value)
    if HAS_WEIGHTS:
        token_weight = tl.load(token_weights + row).to(tl.float64)
        value, scale = value * token_weight, scale * token_weight
    gradient = gradient * scale

    kind = support_gradient.dtype.element_ty
    tl.store(values + row, value.to(kind))
    tl.store(support_gradient + row * num_ids + at, gradient.to(kind), mask=inside)
    tl.store(tail_shift + row, shift.to(kind))
    of_tail = tl.sum(tl.where(is_tail, gradient, 0.0)) / tl.where(total == 0.0, 1.0, total)
    tl.store(tail_scale + row, of_tail.to(kind))


@triton.jit
def _log_softmax(u):
    """Of a row, and its log-sum-exp; a row of nothing but −inf stays one."""
    shift = finite(tl.max(u))
    log_total = log_or_minus_inf(tl.sum(tl.exp(u - shift)))
    return u - shift - finite(log_total), log_total + shift


@triton.jit
def _num_larger(z, others, num_others, LANES: tl.constexpr, STEP: tl.constexpr):
    """How many of the ``others`` in memory are larger than each of z. Compared all with all: a sort is slower."""
    larger = tl.zeros([LANES, STEP], tl.int32)
    for start in range(0, num_others, STEP):
        at = start + tl.arange(0, STEP)
        other = tl.load(others + at, mask=at < num_others, other=float("-inf"))
        larger += (other[None, :] > z[:, None]).to(tl.int32)
    return tl.sum(larger, axis=1)
