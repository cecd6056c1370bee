"""Controllable patching in plain NumPy, written from the method's text alone; float32 where the method promises it."""

import math
from fractions import Fraction

import numpy as np


def top_set(score, rate):
    """Boolean mask of the top entries: exactly k, ties to the lower flat index, zeros never."""
    k = math.floor(Fraction(repr(rate)) * score.size)
    order = np.argsort(-score.astype(np.float64).ravel(), kind="stable")[:k]
    mask = np.zeros(score.size, bool)
    mask[order] = True
    return (mask & (score.ravel() > 0)).reshape(score.shape)


def candidates(top_se, top_osm, combine):
    return {
        "difference": (top_se & ~top_osm, top_osm & ~top_se),
        "intersection": (top_se & top_osm, top_se & top_osm),
        "union": (top_se, top_osm),
    }[combine]


def merge(theta, se, osm, kept_se, kept_osm, alpha, beta, key=None):
    """Merge one matrix; sums in float32, one cast at the end, untouched entries as they were.

    With a key, touched entries of a 16-bit matrix are rounded stochastically.
    """
    theta32 = theta.astype(np.float32)
    merged = theta32.copy()
    merged[kept_se] += np.float32(alpha) * (se - theta32)[kept_se]
    merged[kept_osm] += np.float32(beta) * (osm - theta32)[kept_osm]
    touched = kept_se | kept_osm
    cast = merged.astype(theta.dtype) if key is None or theta.itemsize == 4 else stochastic(merged, theta.dtype, key)
    return np.where(touched, cast, theta), touched


def stochastic(x, dtype, key):
    """Round float32 to one of its two neighbours in a 16-bit dtype, the outer one with the share of the way as probability."""
    nearest = x.astype(dtype)
    towards_zero = nearest.view(np.uint16) - (np.abs(nearest.astype(np.float64)) > np.abs(x)).astype(np.uint16)
    inner, outer = towards_zero.view(dtype), (towards_zero + np.uint16(1)).view(dtype)
    low, high = np.abs(inner.astype(np.float64)), np.abs(outer.astype(np.float64))
    share = (np.abs(x.astype(np.float64)) - low) / (high - low)
    return np.where(random_bits(key, x.shape) * 2.0**-24 < share, outer, inner)


def threefry2x32(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): (uint32, uint32) for each 64-bit counter."""
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    k = [np.uint32(key[0]), np.uint32(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
    x0 = (counter >> np.uint64(32)).astype(np.uint32) + k[0]
    x1 = counter.astype(np.uint32) + k[1]
    for group in range(5):
        for r in rotations[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
        x0 = x0 + k[(group + 1) % 3]
        x1 = x1 + k[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def random_bits(key, shape):
    """24 random bits for each flat index of a tensor."""
    with np.errstate(over="ignore"):
        x0, x1 = threefry2x32(key, np.arange(math.prod(shape), dtype=np.uint64))
    return ((x0 ^ x1) >> np.uint32(8)).reshape(shape)


def retained(key, shape, retention):
    """Bernoulli(p) for each flat index of a tensor."""
    return random_bits(key, shape) < np.uint32(np.float32(retention) * np.float32(2.0**24))
