"""The picture of a patch is drawn for every kind of tensor and for empty sets."""

from safepatch_jax.patching.statistics import STEPS
from safepatch_jax.run.figures import draw_patch

ENTRY = {
    "size": 100,
    "top_se": 10,
    "top_osm": 10,
    "top_both": 2,
    "kept_se": 3,
    "kept_osm": 4,
    "kept": 7,
    "survived": 5,
    "overlap": 0.1,
    "low_se": 1e-4,
    "high_se": 1e-3,
    "largest_se": 1e-3,
    "low_osm": 1e-4,
    "high_osm": 1e-3,
    "largest_osm": 1e-3,
    "steps_se": [3] * len(STEPS),
    "steps_osm": [4] + [0] * (len(STEPS) - 1),
}


def test_blocks_biases_norms_and_what_lies_outside(tmp_path):
    names = []
    for layer in ("model.layers.0", "model.layers.1"):
        names += [f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.q_proj.bias"]
        names += [f"{layer}.mlp.up_proj.weight", f"{layer}.input_layernorm.weight"]
    draw_patch(
        dict.fromkeys(
            [*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"], ENTRY
        ),
        tmp_path / "a.png",
    )
    empty = (
        ENTRY
        | {k: 0 for k in ENTRY if k.startswith(("kept", "top", "survived"))}
        | {"steps_se": [0] * len(STEPS), "steps_osm": [0] * len(STEPS)}
    )
    draw_patch({names[0]: empty}, tmp_path / "b.png")
    compared = ENTRY | {"cosine": -0.4, "norm_se": 1.0, "norm_osm": 2.0}
    compared |= {"nonzero_both": 90, "same_sign": 30}
    draw_patch(dict.fromkeys(names, compared), tmp_path / "c.png")
    widths = {}
    for name in "abc":
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        widths[name] = int.from_bytes(picture[16:20], "big")
    assert widths["a"] == widths["b"] < widths["c"]  # cosine and norms have a column of their own
