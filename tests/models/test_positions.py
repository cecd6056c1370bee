"""Rotary positions by kind of layer, as transformers 5 writes them for Gemma 3."""

import pytest

from safepatch_jax.models.config import config_from_hf
from tests.models.families import tiny_raw, without


def by_kind(**local):
    """config.json of a Gemma 3 text model whose local rotary positions have more than a base."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0, **local},
    }
    raw = tiny_raw("gemma3_text", rope_parameters=ropes)
    return without(raw, "rope_theta", "rope_local_base_freq")


def test_each_kind_has_its_base():
    config = config_from_hf(by_kind(type=None))
    assert (config.rope_theta, config.local_rope_theta) == (100000.0, 50.0)
    assert config.ropes == ("local", "global") and config.rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    "local", [{"rope_type": "linear", "factor": 2.0}, {"partial_rotary_factor": 0.5}]
)
def test_scaled_local_positions_are_refused(local):
    with pytest.raises(ValueError, match="rope_parameters.sliding_attention = "):
        config_from_hf(by_kind(**local))
