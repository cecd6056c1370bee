"""Positions as bytes: a round trip in pieces, LEB128 by hand, and what is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepatch_jax.patch_file import positions


@given(
    st.lists(st.integers(0, 300) | st.integers(0, positions.LIMIT // 64), max_size=60),
    st.integers(1, 30),
)
def test_positions_round_trip_in_pieces(gaps, cut):
    wanted = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    data = np.concatenate(
        [
            positions.encode(part, last)
            for part, last in (
                (wanted[:cut], -1),
                (wanted[cut:], wanted[:cut][-1] if len(wanted) > cut else -1),
            )
        ]
    )
    assert len(data) == sum(max(1, -(-int(g).bit_length() // 7)) for g in gaps)
    got, last, at = [], -1, 0
    for size in itertools.cycle((1, 7, 64)):
        where, used = positions.decode(data[at : at + size], last)
        got, last, at = got + where.tolist(), int(where[-1]) if len(where) else last, at + used
        if at == len(data):
            break
    assert got == wanted.tolist()


@pytest.mark.parametrize(
    "data, gaps", [([0], [0]), ([0x7F], [127]), ([0x80, 1], [128]), ([0xE5, 0x8E, 0x26], [624485])]
)
def test_positions_are_leb128(data, gaps):
    assert positions.encode(np.cumsum(np.array(gaps) + 1) - 1).tolist() == data
    assert positions.decode(np.array(data, np.uint8))[0].tolist() == gaps


@pytest.mark.parametrize(
    "data, message",
    [([0x80, 0], "shortest"), ([0x80] * 6 + [1], "more than 6"), ([0x80] * 9, "more than 6")],
)
def test_positions_that_are_not_coded_right(data, message):
    with pytest.raises(ValueError, match=message):
        positions.decode(np.array(data, np.uint8))
