"""Device code on rows of two models' logits, in Triton: what ``ops.triton_dense`` launches. Formulas: ``ops.dense``.

    B rows      W columns      z, t the student's and the teacher's logits      a program works on one split of one row

Three passes read both models: *statistics* make logarithms of softmax(z) and softmax(t), *sums* the values, *gradient*
the result. No pass leaves a [B, W] tensor but the last. Arithmetic is float32, as of plain torch.

A *sequence* is something of which a row has a log-sum-exp:
"""

# mypy: ignore-errors
# Parameters are pointers and compile-time constants, of which mypy knows nothing.

import triton
import triton.language as tl

from ops.triton_terms import exp, finite, log_or_minus_inf, term

STUDENT = tl.constexpr(0)
TEACHER = tl.constexpr(1)
RULED_OUT = tl.constexpr(2)
"""The student where the teacher's logit is −inf."""
STUDENT_AT_ONE = tl.constexpr(3)
TEACHER_AT_ONE = tl.constexpr(4)
"""At temperature 1, for the metrics."""
NUM_SEQUENCES = tl.constexpr(5)
NUM_SUMS = tl.constexpr(5)
"""Value, Σ weight, Σ q, entropies of teacher and student."""


@triton.jit
def dense_statistics(
    logits,
    logits_stride,
    teacher,
    teacher_stride,
    num_columns,
    width,
    statistics,
    num_splits,
    blocks_per_split,
    TEMPERATURE: tl.constexpr,
    NEEDS_FLOOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """statistics [B, sequences, 2, num_splits] float32: maximum and Σ exp((x − maximum) / τ), τ = 1 for those "at one".
    Unused sequences stay unset.

    Differences are divided by τ, not logits: 1000 / τ is rounded by 6e-5 and more, and where a compiler contracts the
    division and the subtraction after it, that is what the probabilities are off by."""
    BLOCK: tl.constexpr = CHUNKS * CHUNK
    program = tl.program_id(0)
    row, split = (program // num_splits).to(tl.int64), program % num_splits
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK))
    logits += row * logits_stride
    teacher += row * teacher_stride
    column = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]

    nothing = tl.full([CHUNKS], float("-inf"), tl.float32)
    zero = tl.zeros([CHUNKS, CHUNK], tl.float32)
    z_peak, z_total, t_peak, t_total, r_peak, r_total = nothing, zero, nothing, zero, nothing, zero
    z1_peak, z1_total, t1_peak, t1_total = nothing, zero, nothing, zero
    for block in range(first, last):
        z, t = _load(logits, teacher, block * BLOCK, column, num_columns, width, BLOCK)
        if TEMPERATURE != 1.0:
            z1_peak, z1_total = _absorb(z, z1_peak, z1_total, 1.0)
            t1_peak, t1_total = _absorb(t, t1_peak, t1_total, 1.0)
        z_peak, z_total = _absorb(z, z_peak, z_total, TEMPERATURE)
        t_peak, t_total = _absorb(t, t_peak, t_total, TEMPERATURE)
        if NEEDS_FLOOR:
            r_peak, r_total = _absorb(tl.where(t == float("-inf"), z, float("-inf")), r_peak, r_total, TEMPERATURE)
    statistics += row * NUM_SEQUENCES * 2 * num_splits + split
    _store_sequence(statistics, STUDENT, num_splits, z_peak, z_total, TEMPERATURE)
    _store_sequence(statistics, TEACHER, num_splits, t_peak, t_total, TEMPERATURE)
    if NEEDS_FLOOR:
        _store_sequence(statistics, RULED_OUT, num_splits, r_peak, r_total, TEMPERATURE)
    if TEMPERATURE != 1.0:
        _store_sequence(statistics, STUDENT_AT_ONE, num_splits, z1_peak, z1_total, 1.0)
        _store_sequence(statistics, TEACHER_AT_ONE, num_splits, t1_peak, t1_total, 1.0)


@triton.jit
def dense_sums(
    logits,
    logits_stride,
    teacher,
    teacher_stride,
    num_columns,
    width,
    statistics,
    num_statistics,
    sums,
    num_splits,
    blocks_per_split,
    KIND: tl.constexpr,
    SHARE: tl.constexpr,
    LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """sums [B, NUM_SUMS, num_splits] float32. STATISTICS ≥ num_statistics, the splits of the statistics."""
    program = tl.program_id(0)
    row, split = (program // num_splits).to(tl.int64), program % num_splits
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK))
    logits += row * logits_stride
    teacher += row * teacher_stride
    statistics += row * NUM_SEQUENCES * 2 * num_statistics
    z_shift, z_log_total = _sequence(statistics, STUDENT, num_statistics, TEMPERATURE, STATISTICS)
    t_shift, t_log_total = _sequence(statistics, TEACHER, num_statistics, TEMPERATURE, STATISTICS)
    if TEMPERATURE != 1.0:
        z1_shift, z1_log_total = _sequence(statistics, STUDENT_AT_ONE, num_statistics, 1.0, STATISTICS)
        t1_shift, t1_log_total = _sequence(statistics, TEACHER_AT_ONE, num_statistics, 1.0, STATISTICS)
    if LOG_FLOOR is not None:
        floor = _floor(statistics, z_shift, z_log_total, num_statistics, LOG_FLOOR, TEMPERATURE, STATISTICS)
    column = tl.arange(0, BLOCK)

    value = tl.zeros([BLOCK], tl.float32)
    weight, total, p_entropy, q_entropy = value, value, value, value
    for block in range(first, last):
        z, t = _load(logits, teacher, block * BLOCK, column, num_columns, width, BLOCK)
        if TEMPERATURE != 1.0:
            log_p, log_q = t - t1_shift - t1_log_total, z - z1_shift - z1_log_total
            p_entropy -= exp(log_p) * finite(log_p)
            q_entropy -= exp(log_q) * finite(log_q)
        log_p, log_q = _at(t - t_shift, TEMPERATURE) - t_log_total, _at(z - z_shift, TEMPERATURE) - z_log_total
        if TEMPERATURE == 1.0:
            p_entropy -= exp(log_p) * finite(log_p)
            q_entropy -= exp(log_q) * finite(log_q)
        if LOG_FLOOR is not None:
            log_p = tl.where(log_p == float("-inf"), log_q + floor, log_p)
        summand, slope = term(log_p, log_q, KIND, SHARE, LOG_SHARE, LOG_REST, True)
        value += summand
        weight += slope
        total += exp(log_q)
    sums += row * NUM_SUMS * num_splits + split
    tl.store(sums, tl.sum(value))
    tl.store(sums + num_splits, tl.sum(weight))
    tl.store(sums + 2 * num_splits, tl.sum(total))
    tl.store(sums + 3 * num_splits, tl.sum(p_entropy))
    tl.store(sums + 4 * num_splits, tl.sum(q_entropy))


@triton.jit
def dense_gradient(
    out,
    out_stride,
    logits,
    logits_stride,
    teacher,
    teacher_stride,
    num_columns,
    width,
    statistics,
    num_statistics,
    mean,
    row_scale,
    num_splits,
    blocks_per_split,
    KIND: tl.constexpr,
    SHARE: tl.constexpr,
    LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """(weight − q · mean) · row_scale, and 0 in columns that do not exist; mean, row_scale [B] float32. ``out`` may be
    ``logits``."""
    program = tl.program_id(0)
    row, split = (program // num_splits).to(tl.int64), program % num_splits
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(width, BLOCK))
    out += row * out_stride
    logits += row * logits_stride
    teacher += row * teacher_stride
    statistics += row * NUM_SEQUENCES * 2 * num_statistics
    z_shift, z_log_total = _sequence(statistics, STUDENT, num_statistics, TEMPERATURE, STATISTICS)
    t_shift, t_log_total = _sequence(statistics, TEACHER, num_statistics, TEMPERATURE, STATISTICS)
    if LOG_FLOOR is not None:
        floor = _floor(statistics, z_shift, z_log_total, num_statistics, LOG_FLOOR, TEMPERATURE, STATISTICS)
    own_mean, scale = tl.load(mean + row), tl.load(row_scale + row)
    column = tl.arange(0, BLOCK)
    for block in range(first, last):
        start = block * BLOCK
        z, t = _load(logits, teacher, start, column, num_columns, width, BLOCK)
        log_p, log_q = _at(t - t_shift, TEMPERATURE) - t_log_total, _at(z - z_shift, TEMPERATURE) - z_log_total
        if LOG_FLOOR is not None:
            log_p = tl.where(log_p == float("-inf"), log_q + floor, log_p)
        _, slope = term(log_p, log_q, KIND, SHARE, LOG_SHARE, LOG_REST, True)
        gradient = (slope - exp(log_q) * own_mean) * scale
        tl.store(out + start + column, gradient.to(out.dtype.element_ty), mask=column < width - start)


@triton.jit
def _load(logits, teacher, start, column, num_columns, width, BLOCK: tl.constexpr):
    """A tile of both, float32; −inf in both where the student has no column."""
    inside = column < width - start  # the width is often a multiple of 16: then 16 bytes are loaded at once
    z = tl.load(logits + start + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
    t = tl.load(teacher + start + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
    z, t = z.to(tl.float32), t.to(tl.float32)
    if start + BLOCK > num_columns:
        z = tl.where(column < num_columns - start, z, float("-inf"))
    return z, tl.where(z == float("-inf"), float("-inf"), t)


@triton.jit
def _at(difference, TEMPERATURE: tl.constexpr):
    return difference if TEMPERATURE == 1.0 else difference / TEMPERATURE


@triton.jit
def _absorb(x, peak, total, TEMPERATURE: tl.constexpr):
    """One step of the online softmax: ``peak`` [CHUNKS] so far, ``total`` [CHUNKS, CHUNK] Σ exp((x − peak) / τ)."""
    new_peak = tl.maximum(peak, tl.max(x, axis=1))
    shift = finite(new_peak)
    rescale = exp(_at(peak - shift, TEMPERATURE))
    return new_peak, total * rescale[:, None] + exp(_at(x - shift[:, None], TEMPERATURE))


@triton.jit
def _store_sequence(statistics, SEQUENCE: tl.constexpr, num_splits, peak, total, TEMPERATURE: tl.constexpr):
    highest = tl.max(peak)
    tl.store(statistics + SEQUENCE * 2 * num_splits, highest)
    scaled = tl.sum(total, axis=1) * exp(_at(peak - finite(highest), TEMPERATURE))
    tl.store(statistics + (SEQUENCE * 2 + 1) * num_splits, tl.sum(scaled))


@triton.jit
def _sequence(statistics, SEQUENCE: tl.constexpr, num_splits, TEMPERATURE: tl.constexpr, SPLITS: tl.constexpr):
    """Maximum, and log Σ exp((x − maximum) / τ), of all splits; 0 and 0 of an empty sequence."""
    at = tl.arange(0, SPLITS)
    inside = at < num_splits
    peak = tl.load(statistics + SEQUENCE * 2 * num_splits + at, mask=inside, other=float("-inf"))
    total = tl.load(statistics + (SEQUENCE * 2 + 1) * num_splits + at, mask=inside, other=0.0)
    shift = finite(tl.max(peak))
    return shift, finite(log_or_minus_inf(tl.sum(total * exp(_at(peak - shift, TEMPERATURE)))))


@triton.jit
def _floor(
    statistics,
    z_shift,
    z_log_total,
    num_splits,
    LOG_FLOOR: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What log p − log q is where the teacher has ruled a column out; there, p sums to the floor."""
    shift, log_total = _sequence(statistics, RULED_OUT, num_splits, TEMPERATURE, SPLITS)
    return LOG_FLOOR - _at(shift - z_shift, TEMPERATURE) - (log_total - z_log_total)
