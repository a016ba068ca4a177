# mypy: ignore-errors
# A kernel is written in Triton's language, whose types are not Python's.
"""Count in gradients on a GPU, each element read once: chunks first, then layers."""

import triton
import triton.language as tl

CHUNK = 1 << 15
"""Elements that one program of `count_chunks` looks at."""

RECORD = 5
"""What is known of a chunk or a layer, as int64: Inf, NaN, nonzero, |g| > 10, and the bits of its float64 norm."""

_INF = tl.constexpr(float("inf"))
_RECORD = tl.constexpr(RECORD)


@triton.jit
def _tally(values, squares, nonzero, large):
    square = values * values
    return squares + square, nonzero + (values != 0).to(tl.int32), large + (square > 100).to(tl.int32)


@triton.jit(do_not_specialize=["first"])
def count_chunks(
    addresses,  # int64, of each segment: where it starts in memory
    numels,  # int64, of each segment
    chunks,  # int64 pairs, of each chunk: its segment, its number in the segment
    records,  # int64, RECORD for each chunk
    first,  # the first chunk to look at; one program for each from there on
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # segments start at multiples of 16 bytes
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Look at chunks of segments of one dtype.

    A finite sum of squares proves that no element is bad, because squares cannot cancel. So that sum is all that a
    healthy chunk needs; only a chunk where it is not finite is read again, while it is still in the cache.
    """
    chunk = first + tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1) * CHUNK
    size = tl.minimum(tl.load(numels + segment) - start, CHUNK).to(tl.int32)
    base = tl.load(addresses + segment).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        base = tl.multiple_of(base, 16)

    WIDE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    lane = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), WIDE)
    nonzero = tl.zeros((TILE,), tl.int32)
    large = tl.zeros((TILE,), tl.int32)
    whole = size // TILE * TILE
    for place in range(0, whole, TILE):  # without a mask, which would keep loads from being vectorized
        values = tl.load(base + place + lane).to(WIDE)
        squares, nonzero, large = _tally(values, squares, nonzero, large)
    if whole < size:
        values = tl.load(base + whole + lane, mask=whole + lane < size, other=0).to(WIDE)
        squares, nonzero, large = _tally(values, squares, nonzero, large)

    norm = tl.sqrt(tl.sum(squares).to(tl.float64))
    nonzero_count = tl.sum(nonzero)
    large_count = tl.sum(large)
    inf_count = 0
    nan_count = 0
    if not norm < _INF:
        # Bad elements, or finite ones whose squares overflow: 2 ** -600 keeps even those of float64 in range.
        SCALE: tl.constexpr = 2.0**-600 if tl.float64 == DTYPE else 1.0
        inf = tl.zeros((TILE,), tl.int32)
        nan = tl.zeros((TILE,), tl.int32)
        wide = tl.zeros((TILE,), tl.float64)
        for place in range(0, size, TILE):
            values = tl.load(base + place + lane, mask=place + lane < size, other=0).to(WIDE)
            inf += (tl.abs(values) == _INF).to(tl.int32)
            nan += (values != values).to(tl.int32)
            scaled = values.to(tl.float64) * SCALE
            wide += scaled * scaled
        inf_count = tl.sum(inf)
        nan_count = tl.sum(nan)
        large_count -= inf_count  # their squares were above 100 too
        norm = tl.sqrt(tl.sum(wide)) / SCALE

    record = records + chunk * _RECORD
    tl.store(record, inf_count.to(tl.int64))
    tl.store(record + 1, nan_count.to(tl.int64))
    tl.store(record + 2, nonzero_count.to(tl.int64))
    tl.store(record + 3, large_count.to(tl.int64))
    tl.store(record + 4, norm.to(tl.int64, bitcast=True))


@triton.jit
def add_up_layers(
    records,  # int64, RECORD for each chunk, those of a layer together
    starts,  # int64, of each layer: its first chunk; and at last the number of chunks
    layers,  # int64, RECORD for each layer
    WIDTH: tl.constexpr,
):
    """Merge the chunks of each layer, one program per layer, always in the same order.

    Norms are scaled by the largest, so that their squares do not overflow. Inf and NaN stay what they are.
    """
    layer = tl.program_id(0)
    first = tl.load(starts + layer)
    last = tl.load(starts + layer + 1)
    field = tl.arange(0, 4)
    counts = tl.zeros((WIDTH, 4), tl.int64)
    largest = tl.zeros((WIDTH,), tl.float64)
    for start in range(first, last, WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        record = records + chunk * _RECORD
        counts += tl.load(record[:, None] + field[None, :], mask=(chunk < last)[:, None], other=0)
        norms = tl.load(record + 4, mask=chunk < last, other=0).to(tl.float64, bitcast=True)
        largest = tl.maximum(largest, norms)
    scale = tl.max(largest)
    scale = tl.where((scale > 0) & (scale < _INF), scale, 1.0)
    squares = tl.zeros((WIDTH,), tl.float64)
    for start in range(first, last, WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        norms = tl.load(records + chunk * _RECORD + 4, mask=chunk < last, other=0).to(tl.float64, bitcast=True)
        squares += (norms / scale) * (norms / scale)
    norm = tl.sqrt(tl.sum(squares)) * scale
    tl.store(layers + layer * _RECORD + field, tl.sum(counts, axis=0))
    tl.store(layers + layer * _RECORD + 4, norm.to(tl.int64, bitcast=True))
