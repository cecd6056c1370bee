"""Positions of changed entries as bytes: each is its distance to the one before, in seven bits a
byte (LEB128).

Entry i is coded as position[i] - position[i-1] - 1, the first one as its position; so what decodes
at all is strictly increasing. The lowest seven bits come first, and a set high bit says that
another byte follows. At one entry in a hundred a position takes 1.3 bytes.
"""

from __future__ import annotations

import numpy as np

LONGEST = 6  # bytes of one position
LIMIT = 1 << 7 * LONGEST  # elements a tensor may have; a thousand times the largest weight there is


def encode(positions: np.ndarray, previous: int = -1) -> np.ndarray:
    """Code a run of positions.

    Args:
      positions: int64 [n], strictly increasing, above `previous`, below LIMIT.
      previous: the last position of the run before; -1 at the start of a tensor.

    Returns:
      uint8 [n to LONGEST * n].
    """
    gaps = np.diff(positions, prepend=np.int64(previous)) - 1
    lengths = np.ones(len(gaps), np.int64)
    for k in range(1, LONGEST):
        lengths += gaps >= 1 << 7 * k
    starts = np.cumsum(lengths) - lengths
    out = np.empty(lengths.sum(), np.uint8)
    for k in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > k)  # gaps that have a k-th byte
        out[starts[longer] + k] = gaps[longer] >> 7 * k & 127 | (lengths[longer] > k + 1) << 7
    return out


def decode(data: np.ndarray, previous: int = -1) -> tuple[np.ndarray, int]:
    """Decode the whole positions at the beginning of a run of bytes.

    Args:
      data: uint8 [m], m at most 2^20 so that no sum overflows; it may end within a position.
      previous: as in `encode`.

    Returns:
      (positions, int64, strictly increasing; number of bytes that they took).

    Raises:
      ValueError: a position of more than LONGEST bytes, or one that is not coded in the shortest
        way.
    """
    assert len(data) <= 1 << 20
    ends = np.flatnonzero(data < 128)
    starts = np.append(0, ends + 1)
    lengths = ends + 1 - starts[:-1]
    if max(lengths.max(initial=0), len(data) - starts[-1]) > LONGEST:
        raise ValueError(f"a position takes more than {LONGEST} bytes")
    longer = np.flatnonzero(lengths > 1)  # few, mostly
    if not np.all(data[ends[longer]]):
        raise ValueError("a position is not coded in the shortest way")
    gaps = (data[starts[:-1]] & 127).astype(np.int64)
    for k in range(1, lengths.max(initial=0)):
        longer = longer[lengths[longer] > k]  # gaps that have a k-th byte
        gaps[longer] |= (data[starts[longer] + k] & 127).astype(np.int64) << 7 * k
    return np.cumsum(gaps + 1) + previous, int(starts[-1])
