"""A line of small patches: models that follow on one another, and the patch files between them."""

from safepatch_jax.patch_file.create import create
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.chains import DOWN, UP, arrays, changed, write_model

# Entries of each patch of the line; b and c are disjoint, d changes one of a.
ENTRIES = {
    "a": {UP: {1: 0.5, 2: -0.25}},
    "b": {UP: {10: 1.0, 11: 2.0}, DOWN: {3: -1.0}},
    "c": {UP: {20: 0.125}, DOWN: {4: 0.5}},
    "d": {UP: {2: 0.75, 30: 1.0}},
}


def write_line(folder):
    """Write folder/{start,a,b,c,d}, each the model before with more entries, and {a,...}.patch."""
    folder.mkdir(parents=True, exist_ok=True)
    before = write_tiny_model(folder / "start", dtype="bfloat16")
    for name, entries in ENTRIES.items():
        model = write_model(changed(arrays(before), entries), before, folder / name)
        create(before, model, folder / f"{name}.patch")
        before = model
    return folder


def without(folder, *names):
    """What the end of the line would be without some patches, by NumPy alone."""
    tensors = arrays(folder / "start")
    for name, entries in ENTRIES.items():
        if name not in names:
            tensors = changed(tensors, entries)
    return tensors
