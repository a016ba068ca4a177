"""Gradients of every dtype and layout, with bad elements where a test wants them."""

import math

import torch
from hypothesis import strategies as st

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex128, torch.complex64, torch.complex32]
FLOAT8 = [getattr(torch, name) for name in sorted(dir(torch)) if name.startswith("float8_")]
DTYPES = REAL + COMPLEX + FLOAT8

BAD = [math.inf, -math.inf, math.nan]
BAD_COMPLEX = [complex(math.inf, math.nan), complex(math.nan, 1), complex(0, -math.inf), complex(math.nan, math.nan)]

LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "coo", "uncoalesced", "0-d", "empty"]


@st.composite
def gradients(draw):
    """Draw a gradient."""
    dtype = draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(LAYOUTS if dtype in REAL else LAYOUTS[:4] + LAYOUTS[6:]))
    # Around the chunk length, where an off-by-one would live, as well as tiny.
    rows = draw(st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 255, 256, 257])))
    columns = draw(st.one_of(st.integers(1, 40), st.sampled_from([256, 257])))
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    dense = dense.to(torch.complex64 if dtype.is_complex else torch.float32)
    values = BAD + BAD_COMPLEX if dtype.is_complex else BAD
    place_and_value = st.tuples(st.integers(0, dense.numel() - 1), st.sampled_from(values))
    for place, value in draw(st.lists(place_and_value, max_size=9)):
        dense.view(-1)[place] = value
    return lay_out(dense.to(dtype), layout)


def lay_out(dense, layout):
    """Give a dense matrix another layout; its elements may become fewer or more."""
    match layout:
        case "transposed":
            return dense.t()
        case "strided":
            return dense[:, ::2]
        case "expanded":
            return dense[:1].expand(7, -1)
        case "coo":
            return dense.to_sparse()
        case "uncoalesced":
            places = torch.arange(dense.shape[0]) % max(1, dense.shape[0] // 2)
            return torch.sparse_coo_tensor(places[None], dense, dense.shape)
        case "0-d":
            return dense.view(-1)[0].clone()
        case "empty":
            return dense[:0].clone()
    return dense


def expected_counts(gradient):
    """Count with torch's own words."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if gradient.dtype in FLOAT8:
        gradient = gradient.to(torch.float32)
    if gradient.dtype is torch.complex32:
        gradient = gradient.to(torch.complex64)
    return int(torch.isinf(gradient).sum()), int(torch.isnan(gradient).sum())
