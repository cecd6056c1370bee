"""Controllable patching in plain NumPy, written from the method's text alone; float32 where the
method promises it."""

import hashlib
import math
from fractions import Fraction

import numpy as np

ROLES = ("se", "osm")


def count(rate, size):
    """floor(rate * size) in the decimal digits of the rate."""
    return math.floor(Fraction(repr(rate)) * size)


def largest(values, k):
    """Boolean mask of the k largest entries, ties to the lower flat index, zeros never."""
    order = np.argsort(-values.astype(np.float64).ravel(), kind="stable")[:k]
    mask = np.zeros(values.size, bool)
    mask[order] = True
    return (mask & (values.ravel() > 0)).reshape(values.shape)


def top_set(importance, rate):
    """Of scores; those below the smallest normal number count as 0."""
    return largest(flushed(importance), count(rate, importance.size))


def top_sets(importances, rate, granularity):
    """Masks of the top entries of a list of tensors: of each, of each row of each, or of all of
    them together."""
    if granularity == "matrix":
        return [top_set(x, rate) for x in importances]
    if granularity == "row":
        return [row_sets(x, rate) for x in importances]
    whole = top_set(np.concatenate([x.ravel() for x in importances]), rate)
    parts = np.split(whole, np.cumsum([x.size for x in importances])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, importances)]


def row_sets(importance, rate):
    rows = importance.reshape(-1, importance.shape[-1])
    return np.stack([top_set(row, rate) for row in rows]).reshape(importance.shape)


def flushed(x):
    """Subnormal numbers as zeros of their sign, as XLA computes on CPU."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def compared(theta, se, osm):
    """How two patches stand to each other, in float64: cosine, (both changed, in the same
    direction), norms."""
    patches = []
    for derived in (se, osm):
        patch = flushed(flushed(derived) - flushed(theta.astype(np.float32)))
        patches.append(patch.astype(np.float64).ravel())
    norms = [np.sqrt(np.sum(patch**2)) for patch in patches]
    both = (patches[0] != 0) & (patches[1] != 0)
    same = both & (np.sign(patches[0]) == np.sign(patches[1]))
    cosine = np.sum(patches[0] * patches[1]) / (norms[0] * norms[1]) if all(norms) else 0.0
    return cosine, (both.sum(), same.sum()), norms


def patch_and_importance(theta, derived, sensitivity, importance, key=None):
    derived = flushed(derived)
    patch = flushed(derived - flushed(theta.astype(np.float32)))
    if importance == "random":
        return patch, np.where(patch != 0, (random_bits(key, patch.shape) + 1.0) / 2**24, 0)
    if importance == "magnitude":
        return patch, np.abs(patch)
    return patch, flushed(
        np.abs(patch if importance == "delta" else derived) * flushed(sensitivity)
    )


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
    for derived, kept, weight in ((se, kept_se, alpha), (osm, kept_osm, beta)):
        patch = flushed(flushed(derived) - flushed(theta32))
        added = flushed(np.float32(weight) * patch)
        merged = np.where(kept, flushed(flushed(merged) + added), merged)
    touched = kept_se | kept_osm
    cast = (
        merged.astype(theta.dtype)
        if key is None or theta.itemsize == 4
        else stochastic(merged, theta.dtype, key)
    )
    return np.where(touched, cast, theta), touched


def stochastic(x, dtype, key):
    """Round float32 to one of its two neighbours in a 16-bit dtype, the outer one with the share of
    the way as probability."""
    nearest = x.astype(dtype)
    towards_zero = nearest.view(np.uint16) - (
        np.abs(nearest.astype(np.float64)) > np.abs(x)
    ).astype(np.uint16)
    inner, outer = towards_zero.view(dtype), (towards_zero + np.uint16(1)).view(dtype)
    low, high = np.abs(inner.astype(np.float64)), np.abs(outer.astype(np.float64))
    share = (np.abs(x.astype(np.float64)) - low) / (high - low)
    return np.where(random_bits(key, x.shape) * 2.0**-24 < share, outer, inner)


def threefry2x32(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): (uint32, uint32) for each 64-bit
    counter."""
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


def key(seed, role, name):
    return np.frombuffer(hashlib.sha256(f"{seed}|{role}|{name}".encode()).digest()[:8], "<u4")


def words(key, shape):
    """32 random bits for each flat index of a tensor."""
    with np.errstate(over="ignore"):
        x0, x1 = threefry2x32(key, np.arange(math.prod(shape), dtype=np.uint64))
    return (x0 ^ x1).reshape(shape)


def random_bits(key, shape):
    """24 random bits for each flat index of a tensor."""
    return words(key, shape) >> np.uint32(8)


def retained(key, shape, retention):
    """Bernoulli(p) for each flat index of a tensor."""
    return random_bits(key, shape) < np.uint32(np.float32(retention) * np.float32(2.0**24))


def filled(key, sets, tops, patches, retention):
    """Candidates and random others outside both top sets, floor(p * size) in all; a coin says whose
    others they are."""
    random = words(key, patches[0].shape)
    result = []
    for side, (candidates, patch) in enumerate(zip(sets, patches)):
        offered = ~tops[0] & ~tops[1] & (random % 2 == side) & (patch != 0)
        room = max(count(retention, patch.size) - int(candidates.sum()), 0)
        result.append(candidates | largest(np.where(offered, random // 2 | 1, 0), room))
    return result


def safepatched(tensors, patch, seed, rounding="nearest"):
    """Patch a list of HF tensors: dicts of name, theta, se, osm (derived models), sensitivity_se,
    sensitivity_osm.

    Returns (merged tensors, kept sets as (SE, OSM) pairs).
    """
    tops, patches = [], []
    for role, rate in (("se", patch.top_rate_se), ("osm", patch.top_rate_osm)):
        deltas, importances = [], []
        for t in tensors:
            random = key(seed, f"top_{role}", t["name"])
            sensitivity = t[f"sensitivity_{role}"]
            delta, importance = patch_and_importance(
                t["theta"], t[role], sensitivity, patch.importance, random
            )
            deltas.append(delta)
            importances.append(importance)
        patches.append(deltas)
        tops.append(top_sets(importances, rate, patch.granularity))
    scale = 1 / patch.retention if patch.rescale else 1.0
    merged, kept = [], []
    for t, deltas, top in zip(tensors, zip(*patches), zip(*tops)):
        sets = candidates(*top, patch.combine)
        if patch.support == "fill":
            sets = filled(key(seed, "fill", t["name"]), sets, top, deltas, patch.retention)
        else:
            draws = [
                retained(key(seed, r, t["name"]), sets[0].shape, patch.retention) for r in ROLES
            ]
            sets = [mask & draw for mask, draw in zip(sets, draws)]
        random = key(seed, "rounding", t["name"]) if rounding == "stochastic" else None
        weights = patch.alpha * scale, patch.beta * scale
        merged.append(merge(t["theta"], t["se"], t["osm"], *sets, *weights, random)[0])
        kept.append(sets)
    return merged, kept


def baseline(tensor, patch, seed):
    """What the merging baselines add to one tensor, as their papers write it, in float64: one term
    for each patch."""
    theta, se, osm = (tensor[n].astype(np.float64) for n in ("theta", "se", "osm"))
    p = patch.retention
    drop = [retained(key(seed, r, tensor["name"]), theta.shape, p) / p for r in ("se", "osm")]
    tau = [patch.alpha * (se - theta), patch.beta * (osm - theta)]
    if patch.merge == "average":
        return [t / 2 for t in tau]
    if patch.merge == "task_arithmetic":
        return tau
    if patch.merge == "resta":
        return [0 * theta, patch.beta * (theta - osm) * drop[1]]
    if patch.merge == "ties":
        trimmed = [top_set(np.abs(model - theta), patch.density) for model in (se, osm)]
        tau = [t * mask for t, mask in zip(tau, trimmed)]
    else:
        tau = [t * d for t, d in zip(tau, drop)]
    if patch.merge == "dare":
        return tau
    sign = np.sign(sum(tau))
    agree = [(np.sign(t) == sign) & (t != 0) for t in tau]
    return [t * a / np.maximum(agree[0].astype(int) + agree[1], 1) for t, a in zip(tau, agree)]


def add_terms(tensor, terms):
    """Add float64 terms, each a multiple of its patch, in float32 and in order, with one cast at
    the end."""
    theta = tensor["theta"].astype(np.float64)
    patches = [tensor[r].astype(np.float64) - theta for r in ("se", "osm")]
    weights = [np.divide(t, p, out=np.zeros_like(t), where=t != 0) for t, p in zip(terms, patches)]
    return merge(tensor["theta"], tensor["se"], tensor["osm"], *(t != 0 for t in terms), *weights)
