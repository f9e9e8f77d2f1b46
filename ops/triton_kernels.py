"""Device code on rows of logits, in Triton: what ``ops.triton_rows`` launches. No tensors here, only pointers.

    B rows      W columns      C ids of a row's support      NO_ID follows the last id, so a walk over them ends

A row is cut into chunks of CHUNK columns, and a tile holds CHUNKS of them: [CHUNKS, CHUNK], a chunk lying in a few
neighbouring threads, so that a chunk's maximum costs next to nothing. It is at once the step of the online softmax and
what later finds the k largest columns: they lie in the k chunks with the largest maxima.

Offsets of rows are 64 bits wide (8192 rows of 262144 columns are 2³¹ elements), columns 32.
"""

# mypy: ignore-errors
# Parameters are pointers and compile-time constants, of which mypy knows nothing.

import triton
import triton.language as tl

NO_ID = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**31))
"""Smaller than the key of any number, −inf included."""
LAST_KEY = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def prepare_support(
    logits,
    logits_stride,
    ids,
    sorted_ids,
    support_logits,
    num_ids,
    IDS: tl.constexpr,
):
    """One row: its support's logits, and the ids in ascending order with NO_ID for −1 and behind the last.

    ids [B, C] int64, sorted_ids [B, IDS] int32 with IDS > C a power of two, support_logits [B, C] float32.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, IDS)
    inside = at < num_ids
    column = tl.load(ids + row * num_ids + at, mask=inside, other=-1)
    named = column >= 0
    z = tl.load(logits + row * logits_stride + column, mask=named, other=float("-inf"))
    tl.store(support_logits + row * num_ids + at, z.to(tl.float32), mask=inside)
    tl.store(sorted_ids + row * IDS + at, tl.sort(tl.where(named, column, NO_ID).to(tl.int32)))


@triton.jit
def reduce_tail(
    logits,
    logits_stride,
    num_columns,
    width,
    sorted_ids,
    chunk_max,
    chunk_stride,
    tail_max,
    tail_sum,
    num_splits,
    blocks_per_split,
    IDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP_CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One split of one row: maximum and Σ exp(z − maximum) of its tail, the support left out and not subtracted.

    A tile meets the ids that lie in it one by one (they are sorted); each costs one comparison per column of the tile.
    Every column of a tile has a sum of its own until the end: a few dozen additions each, so float32 loses nothing.

    tail_max, tail_sum [B, num_splits] float32; chunk_max [B, chunk_stride] dtype of the logits, with KEEP_CHUNKS.
    AHEAD: the next tile is loaded before this one is worked on.
    """
    BLOCK: tl.constexpr = CHUNK * CHUNKS
    program = tl.program_id(0)
    row = (program // num_splits).to(tl.int64)
    split = program % num_splits
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK)) - 1
    last = tl.maximum(last, first)

    logits += row * logits_stride
    sorted_ids += row * IDS
    chunk_max += row * chunk_stride
    # Columns are counted from the start of a tile: counted from that of the row, compilers make them 64 bits wide.
    column = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]

    at = tl.sum((tl.load(sorted_ids + tl.arange(0, IDS)) < first * BLOCK).to(tl.int32))
    hidden = tl.load(sorted_ids + at)
    peak = tl.full([CHUNKS], float("-inf"), tl.float32)
    total = tl.zeros([CHUNKS, CHUNK], tl.float32)
    tile = _load(logits, first * BLOCK, column, width)
    for block in range(first, last):
        if AHEAD:
            following = _load(logits, (block + 1) * BLOCK, column, width)
        z, at, hidden = _hide(tile.to(tl.float32), column, block * BLOCK, sorted_ids, at, hidden, BLOCK)
        peak, total = _absorb(z, peak, total, chunk_max, chunk_stride, block, KEEP_CHUNKS)
        if not AHEAD:
            following = _load(logits, (block + 1) * BLOCK, column, width)
        tile = following
    # The last tile may reach beyond the columns that exist; asked in the loop this costs a select per column.
    z = tl.where(column < num_columns - last * BLOCK, tile.to(tl.float32), float("-inf"))
    z, at, hidden = _hide(z, column, last * BLOCK, sorted_ids, at, hidden, BLOCK)
    peak, total = _absorb(z, peak, total, chunk_max, chunk_stride, last, KEEP_CHUNKS)
    highest = tl.max(peak)
    scale = _exp(peak - tl.where(highest == float("-inf"), 0.0, highest))
    tl.store(tail_max + row * num_splits + split, highest)
    tl.store(tail_sum + row * num_splits + split, tl.sum(tl.sum(total, axis=1) * scale))


@triton.jit
def merge_splits(
    split_max,
    split_sum,
    tail_max,
    tail_sum,
    num_rows,
    num_splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Some rows: what ``reduce_tail`` found in their splits [B, num_splits], of the whole row [B]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    exists = (row < num_rows)[:, None] & (split < num_splits)[None, :]
    at = row[:, None] * num_splits + split[None, :]
    peak = tl.load(split_max + at, mask=exists, other=float("-inf"))
    total = tl.load(split_sum + at, mask=exists, other=0.0)
    highest = tl.max(peak, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(tail_max + row, highest, mask=row < num_rows)
    tl.store(tail_sum + row, tl.sum(total * _exp(peak - shift[:, None]), axis=1), mask=row < num_rows)


@triton.jit
def _load(logits, start, column, width):
    """A tile. Masked by the width, often a multiple of 16 and then known as such, so that 16 bytes are loaded at once;
    the number of columns that exist may be any."""
    return tl.load(logits + start + column, mask=column < width - start, other=0.0, eviction_policy="evict_first")


@triton.jit
def _hide(z, column, start, sorted_ids, at, hidden, BLOCK: tl.constexpr):
    """The tile without the ids that lie in it, and the next id (``hidden``, the ``at``-th)."""
    while hidden < start + BLOCK:
        z = tl.where(column == hidden - start, float("-inf"), z)
        at += 1
        hidden = tl.load(sorted_ids + at)
    return z, at, hidden


@triton.jit
def _absorb(z, peak, total, chunk_max, chunk_stride, block, KEEP_CHUNKS: tl.constexpr):
    """One step of the online softmax: ``peak`` [CHUNKS] so far, ``total`` [CHUNKS, CHUNK] Σ exp(z − peak)."""
    best = tl.max(z, axis=1)
    if KEEP_CHUNKS:
        number = block * z.shape[0] + tl.arange(0, z.shape[0])
        tl.store(chunk_max + number, best.to(chunk_max.dtype.element_ty), mask=number < chunk_stride)
    new_peak = tl.maximum(peak, best)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # exp(−inf − 0) is 0 as it should be, not NaN
    return new_peak, total * _exp(peak - shift)[:, None] + _exp(z - shift[:, None])


@triton.jit
def largest_of_tail(
    logits,
    logits_stride,
    num_columns,
    sorted_ids,
    chunk_max,
    chunk_stride,
    num_chunks,
    chosen,
    largest,
    k,
    IDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
):
    """One row: the k largest logits of its tail.

    The k-th largest chunk maximum is found by bisection on the keys, then the k chunks are compared column by column
    in the same way; k columns are at least as large as that k-th maximum, so it bounds the second search from below.

    chunk_max [B, chunk_stride] as ``reduce_tail`` left it, chosen [B, K] int32 scratch, largest [B, k] float32;
    CHUNKS ≥ num_chunks and K ≥ k are powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    own_ids = sorted_ids + row * IDS

    number = tl.arange(0, CHUNKS)
    exists = number < num_chunks
    maxima = tl.load(chunk_max + row * chunk_stride + number, mask=number < chunk_stride, other=0.0)
    keys = tl.where(exists, _key(maxima), NO_KEY)
    num_chosen = tl.minimum(k, num_chunks)
    bound = _kth_largest(keys, num_chosen, tl.min(tl.where(exists, keys, LAST_KEY)))
    above = keys > bound
    equal = keys == bound
    place = tl.where(
        above,
        tl.cumsum(above.to(tl.int32), axis=0) - 1,
        tl.sum(above.to(tl.int32)) + tl.cumsum(equal.to(tl.int32), axis=0) - 1,
    )
    tl.store(chosen + row * K + place, number, mask=(above | equal) & (place < num_chosen))
    tl.debug_barrier()

    rank = tl.arange(0, K)
    begin = tl.load(chosen + row * K + rank, mask=rank < num_chosen, other=0) * CHUNK
    columns = begin[:, None] + tl.arange(0, CHUNK)[None, :]
    exists = (rank < num_chosen)[:, None] & (columns < num_columns)
    z = tl.load(logits + row * logits_stride + columns, mask=exists, other=0.0)
    keys = tl.where(exists, _key(z), NO_KEY)
    at = _first_not_below(own_ids, begin, IDS)
    hidden = tl.load(own_ids + at)
    while tl.max((hidden < begin + CHUNK).to(tl.int32)) > 0:
        keys = tl.where(columns == hidden[:, None], NO_KEY, keys)
        at = tl.where(hidden < begin + CHUNK, at + 1, at)
        hidden = tl.load(own_ids + at)

    exists = keys != NO_KEY
    num_wanted = tl.minimum(k, tl.sum(exists.to(tl.int32)))
    smallest = tl.min(tl.where(exists, keys, LAST_KEY))
    bound = _kth_largest(keys, num_wanted, tl.where(k <= num_chunks, bound, smallest))
    above = keys > bound
    per_chunk = tl.sum(above.to(tl.int32), axis=1)
    place = (tl.cumsum(per_chunk, axis=0) - per_chunk)[:, None] + tl.cumsum(above.to(tl.int32), axis=1) - 1
    num_above = tl.sum(per_chunk)
    # Those above the k-th largest in the order of the columns, then the k-th largest as often as it takes.
    tl.store(largest + row * k + place, z.to(tl.float32), mask=above)
    kth = tl.max(tl.where(keys == bound, z.to(tl.float32), float("-inf")))
    rest = tl.where(rank < num_wanted, kth, float("-inf"))
    tl.store(largest + row * k + rank, rest, mask=(rank >= num_above) & (rank < k))


@triton.jit
def expand_row(
    out,
    out_stride,
    logits,
    logits_stride,
    num_columns,
    width,
    ids,
    num_ids,
    tail_shift,
    tail_scale,
    support_gradient,
    num_splits,
    blocks_per_split,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one row: scale · exp(z − shift), then the support's gradient over it. ``out`` may be ``logits``."""
    program = tl.program_id(0)
    row = (program // num_splits).to(tl.int64)
    split = program % num_splits
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(width, BLOCK))

    own_logits = logits + row * logits_stride
    own_out = out + row * out_stride
    shift = tl.load(tail_shift + row).to(tl.float32)
    scale = tl.load(tail_scale + row).to(tl.float32)
    column = tl.arange(0, BLOCK)
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BLOCK
        inside = column < width - start
        z = tl.load(own_logits + start + column, mask=inside, other=0.0, eviction_policy="evict_first")
        gradient = _exp(z.to(tl.float32) - shift) * scale
        if start + BLOCK > num_columns:
            gradient = tl.where(column < num_columns - start, gradient, 0.0)
        tl.store(own_out + start + column, gradient.to(out.dtype.element_ty), mask=inside)
    # The tail's formula may have overflowed at the support; what it wrote there is replaced, in this order.
    tl.debug_barrier()
    at = tl.arange(0, IDS)
    own_id = tl.load(ids + row * num_ids + at, mask=at < num_ids, other=-1)
    mine = (own_id >= first * BLOCK) & (own_id < last * BLOCK)
    given = tl.load(support_gradient + row * num_ids + at, mask=mine, other=0.0)
    tl.store(own_out + own_id, given.to(tl.float32).to(out.dtype.element_ty), mask=mine)


@triton.jit
def _exp(x):
    """Without the denormal results that ``tl.exp`` spends three more instructions on."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _key(z):
    """int32 that is ordered as the numbers are: the bits, with those of negative numbers mirrored."""
    if z.dtype.primitive_bitwidth == 16:
        bits = z.to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    else:
        bits = z.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key


@triton.jit
def _kth_largest(keys, k, low):
    """The k-th largest of the keys, [N] or [M, N] → scalar; at least k keys must reach ``low``.

    So do they a bound in low..high, and each turn halves what is between these two, until one is reached by k keys.
    """
    high = tl.max(keys)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count = tl.sum((keys >= middle).to(tl.int32))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    return tl.min(tl.where(keys >= low, keys, LAST_KEY))


@triton.jit
def _first_not_below(own_ids, begin, IDS: tl.constexpr):
    """For each of ``begin``: how many of the row's sorted ids are below it. The last of IDS is NO_ID."""
    at = tl.zeros_like(begin)
    step = tl.full([], IDS // 2, tl.int32)
    while step > 0:
        below = tl.load(own_ids + at + step - 1) < begin
        at = tl.where(below, at + step, at)
        step = step // 2
    return at
