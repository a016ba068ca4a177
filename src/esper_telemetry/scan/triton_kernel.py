# mypy: ignore-errors
# A kernel is written in Triton's language, whose types are not Python's.
"""Count in gradients on a GPU, each element read once: chunks first, then layers."""

import triton
import triton.language as tl

CHUNK = 1 << 15
"""Elements that `count_chunks` looks at in one go."""

RECORD = 5
"""What is known of a chunk or a layer, as int64: Inf, NaN, nonzero, |g| > 10, and the bits of its float64 norm."""

WARPS = 8
"""Of each program, whichever kernel it runs; they suit the numbers of rows and records below."""

_INF = tl.constexpr(float("inf"))
_CHUNK = tl.constexpr(CHUNK)
_RECORD = tl.constexpr(RECORD)
_ROWS = tl.constexpr(1024)  # that a program reads at once, 16 bytes each
_RECORDS = tl.constexpr(512)  # that a program adds up at once


@triton.jit
def _tally(values, squares, nonzero, large):
    """Add up each row; counts are floats, whose sums take other units of the processor than comparisons do."""
    square = values * values
    squares += tl.sum(square, axis=1)
    nonzero += tl.sum((values != 0).to(tl.float32), axis=1)
    large += tl.sum((square > 100).to(tl.float32), axis=1)
    return squares, nonzero, large


@triton.jit(do_not_specialize=["first"])
def count_chunks(
    addresses,  # int64, of each segment: where it starts in memory
    numels,  # int64, of each segment
    chunks,  # int32 pairs, of each chunk: its segment, its number in the segment
    records,  # int64, RECORD for each chunk, those of a layer together
    first,  # the chunk that the first program looks at
    DTYPE: tl.constexpr,
):
    """Look at chunks of segments of one dtype, one program per chunk.

    A finite sum of squares proves that no element is bad, because squares cannot cancel. So that sum is all that a
    healthy chunk needs; only a chunk where it is not finite is read again, while it is still in the cache.
    """
    WIDE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // BYTES  # a thread reads so much at once, if it starts at a multiple of 16 bytes
    row = tl.arange(0, _ROWS)
    lane = row[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    corner = tl.arange(0, 2 * VECTOR)

    chunk = first + tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * _CHUNK
    size = tl.minimum(tl.load(numels + segment) - start, _CHUNK).to(tl.int32)
    address = tl.load(addresses + segment) + start * BYTES
    head = tl.minimum((((-address) & 15) // BYTES).to(tl.int32), size)
    rows = (size - head) // VECTOR
    whole = rows // _ROWS * _ROWS
    vectors = tl.multiple_of((address + head * BYTES).to(tl.pointer_type(DTYPE)), 16)

    squares = tl.zeros((_ROWS,), WIDE)
    nonzero = tl.zeros((_ROWS,), tl.float32)
    large = tl.zeros((_ROWS,), tl.float32)
    for place in range(0, whole, _ROWS):
        values = tl.load(vectors + place * VECTOR + lane).to(WIDE)
        squares, nonzero, large = _tally(values, squares, nonzero, large)
    if whole < rows:
        values = tl.load(vectors + whole * VECTOR + lane, mask=(whole + row < rows)[:, None], other=0).to(WIDE)
        squares, nonzero, large = _tally(values, squares, nonzero, large)
    # What is before the first row and behind the last.
    corners = address.to(tl.pointer_type(DTYPE)) + corner + tl.where(corner < head, 0, rows * VECTOR)
    edge = tl.load(corners, mask=corner < size - rows * VECTOR, other=0).to(WIDE)
    norm = tl.sqrt((tl.sum(squares) + tl.sum(edge * edge)).to(tl.float64))
    nonzero_count = tl.sum(nonzero).to(tl.int32) + tl.sum((edge != 0).to(tl.int32))
    large_count = tl.sum(large).to(tl.int32) + tl.sum((edge * edge > 100).to(tl.int32))
    inf_count = tl.full((), 0, tl.int32)
    nan_count = tl.full((), 0, tl.int32)
    if not norm < _INF:
        inf = tl.zeros((_ROWS,), tl.float32)
        nan = tl.zeros((_ROWS,), tl.float32)
        for place in range(0, rows, _ROWS):
            values = tl.load(vectors + place * VECTOR + lane, mask=(place + row < rows)[:, None], other=0).to(WIDE)
            inf += tl.sum((tl.abs(values) == _INF).to(tl.float32), axis=1)
            nan += tl.sum((values != values).to(tl.float32), axis=1)
        inf_count = tl.sum(inf).to(tl.int32) + tl.sum((tl.abs(edge) == _INF).to(tl.int32))
        nan_count = tl.sum(nan).to(tl.int32) + tl.sum((edge != edge).to(tl.int32))
        large_count -= inf_count  # their squares were above 100 too
        if inf_count + nan_count == 0:
            # Finite elements whose squares overflow: 2 ** -600 keeps even those of float64 in range.
            SCALE: tl.constexpr = 2.0**-600 if tl.float64 == DTYPE else 1.0
            edge_scaled = edge.to(tl.float64) * SCALE
            total = tl.sum(edge_scaled * edge_scaled)
            for place in range(0, rows, _ROWS):
                values = tl.load(vectors + place * VECTOR + lane, mask=(place + row < rows)[:, None], other=0)
                scaled = values.to(tl.float64) * SCALE
                total += tl.sum(tl.sum(scaled * scaled, axis=1))
            norm = tl.sqrt(total) / SCALE

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
):
    """Merge the chunks of each layer, one program per layer, always in the same order.

    Norms are scaled by the largest, so that their squares do not overflow. Inf and NaN stay what they are.
    """
    layer = tl.program_id(0)
    first = tl.load(starts + layer).to(tl.int32)
    last = tl.load(starts + layer + 1).to(tl.int32)
    field = tl.arange(0, 4)
    counts = tl.zeros((_RECORDS, 4), tl.int64)
    largest = tl.zeros((_RECORDS,), tl.float64)
    for start in range(first, last, _RECORDS):
        chunk = start + tl.arange(0, _RECORDS)
        record = records + chunk.to(tl.int64) * _RECORD
        there = chunk < last
        counts += tl.load(record[:, None] + field[None, :], mask=there[:, None], other=0)
        norms = tl.load(record + 4, mask=there, other=0).to(tl.float64, bitcast=True)
        largest = tl.maximum(largest, norms)
    scale = tl.max(largest)
    scale = tl.where((scale > 0) & (scale < _INF), scale, 1.0)
    squares = tl.zeros((_RECORDS,), tl.float64)
    for start in range(first, last, _RECORDS):
        chunk = start + tl.arange(0, _RECORDS)
        record = records + chunk.to(tl.int64) * _RECORD
        norms = tl.load(record + 4, mask=chunk < last, other=0).to(tl.float64, bitcast=True)
        squares += (norms / scale) * (norms / scale)
    norm = tl.sqrt(tl.sum(squares)) * scale
    result = layers + layer * _RECORD
    tl.store(result + field, tl.sum(counts, axis=0))
    tl.store(result + 4, norm.to(tl.int64, bitcast=True))
