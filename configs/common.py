"""What the configs of the paper's backbones share: starting points for real hardware
(docs/faithfulness.md).

The paper does not publish its hyper-parameters. These are a place to start a search from (python -m
launch.sweep), not its values, and have not been run at this size.
"""

import pathlib

ARCHITECTURES = pathlib.Path(__file__).resolve().parent / "architectures"


# One block's gradient at a time in training, of the patch scope alone; half the scratch on disk.
LAYERWISE = {
    "derive": {
        "train": "scope",
        "backward": "layerwise",
        "optimizer": "adafactor",
        # A bound on the global norm would take a second backward pass; Adafactor bounds each
        # update.
        "clip_norm": 0.0,
        "store": "bfloat16",
    },
    # Weights are read once for 8 samples; 8 gradients of one block exist at once.
    "score": {"store": "bfloat16", "in_flight": 8},
    # A checkpoint takes 4 bytes for each trained weight, longer to write than most steps.
    "run": {"checkpoint_minutes": 0.0},
}


def paper_config(
    source: str = "", architecture: str = "", *, top_rate: float = 0.03, **groups
) -> dict:
    """Return the CONFIG of a 7B to 70B backbone; `groups` replace whole options of a group.

    Args:
      source: of the model, as model.source; '' where the user must give it.
      architecture: a file of configs/architectures: the facts of its config.json, for plans without
        the model; '' for none.
      top_rate: share of entries in each top set.
    """
    stand_in = str(ARCHITECTURES / f"{architecture}.json") if architecture else ""
    config = {
        "model": {
            "source": source,
            "architecture": stand_in,
            "compute_dtype": "bfloat16",
            "remat": "full",
        },
        "mesh": {"shape": "data:1,fsdp:-1,tensor:1"},
        # The paper's; all three are fetched, with their checksums (docs/data.md).
        "data": {
            "harmful": "set:advbench",
            "lookalike": "set:xstest",
            "ordinary": "set:alpaca",
            "max_prompt_tokens": 128,
            "max_answer_tokens": 64,
            "train_limit": 400,
            "eval_limit": 200,
        },
        "derive": {
            "batch_size": 16,
            "se_steps": 50,
            "se_learning_rate": 5e-6,
            "se_nll_ceiling": 10.0,
            "osm_steps": 75,
            "osm_learning_rate": 1e-5,
        },
        "score": {"samples": 128},
        "patch": {
            "top_rate_se": top_rate,
            "top_rate_osm": top_rate,
            "retention": 0.3,
            "alpha": 1.0,
            "beta": 1.0,
        },
        # Most patch entries are below one bfloat16 step of their weight; rounded to nearest they
        # would be lost.
        "export": {"dtype": "keep", "rounding": "stochastic"},
        "evaluate": {"batch_size": 32, "max_new_tokens": 64},
        "run": {"seed": 0},
    }
    for group, options in groups.items():
        config[group] = config.get(group, {}) | options
    return config
