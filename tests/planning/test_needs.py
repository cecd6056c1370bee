"""FLOPs that steps need: by hand, and beside those that programs compute."""

import dataclasses

from benchmarks.common import raw_config
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.planning.compile import Figures, utilisation
from safepatch_jax.planning.needs import decode_flops, train_flops

CONFIG = config_from_hf(raw_config("tiny", None))
HIDDEN, MLP, HEADS, KV_HEADS, SIZE, VOCAB, LAYERS = 64, 176, 4, 2, 16, 512, 2
BLOCKS = LAYERS * (2 * HIDDEN * HEADS * SIZE + 2 * HIDDEN * KV_HEADS * SIZE + 3 * HIDDEN * MLP)
PAIR = 4 * HEADS * SIZE  # two products


def test_a_head_without_a_gradient_needs_two_thirds():
    whole, frozen = (train_flops(CONFIG, 5, 16, 4, head=head) for head in (True, False))
    assert whole - frozen == 5 * 2 * VOCAB * HIDDEN * 4


def test_of_a_window_the_keys_within_count():
    windowed = dataclasses.replace(CONFIG, windows=(0, 3))
    saved = sum(max(0, seen - 3) for seen in range(1, 17))
    less = train_flops(CONFIG, 1, 16, 4) - train_flops(windowed, 1, 16, 4)
    assert less == 3 * PAIR * saved
    longer = dataclasses.replace(CONFIG, windows=(0, 99))
    assert train_flops(longer, 1, 16, 4) == train_flops(CONFIG, 1, 16, 4)


def test_decoding_reads_all_but_the_last_token():
    read = 10 + 3 - 1
    forward = 2 * BLOCKS * read + 3 * 2 * VOCAB * HIDDEN + LAYERS * PAIR * read * (read + 1) // 2
    assert decode_flops(CONFIG, 2, 10, 3) == 2 * forward


def figures(title, step, least, **seconds):
    return Figures(
        title, "train", None, 0.1, 9, 0, floor=seconds, step=step, least_flops=least, rated_flops=8
    )


def test_utilisation_is_of_the_least_time_of_a_whole_step():
    forward = figures("forward", "train", 12, compute=1.0, memory=0.5)
    backward = figures("backward", "train", 12, compute=1.0, memory=2.0)
    patch = figures("patch", "", 0, memory=1.0)
    assert utilisation([forward, backward, patch]) == {"train": 12 / (8 * 2.5)}
    # One that is refused has no floor, and a chip that is not known no rate.
    assert not utilisation([forward, dataclasses.replace(backward, floor={})])
    assert not utilisation([dataclasses.replace(forward, rated_flops=0.0)])
