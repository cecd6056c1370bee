"""The layerwise update against the whole tree's: the same parameters, moments, norm and NLL."""

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.testing import tiny_config, write_tiny_model
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import Likelihood, Mismatch
from safepatch_jax.training.step import Saving, Trainer
from tests.conftest import sharder_of

PAIRS = [(f"question {i}", "yes, number " * (1 + i % 2)) for i in range(8)]


class Cut(Exception):
    pass


def tuned(
    tiny,
    layerwise,
    steps=3,
    devices=1,
    tensor=1,
    sign=-1.0,
    ceiling=float("inf"),
    saving=None,
    record=None,
    **options,
):
    """Return (flat parameters, outcome, measures of each step) of a short run."""
    sharder = sharder_of(devices, tensor)
    config, params = load_params(tiny, sharder)
    examples = Chat(tiny, config.vocab_size).encode_all(PAIRS, 64, 32).examples
    decoder = Decoder(config, jnp.float32, sharder, remat="full")
    table, measures = param_table(config), []
    trainer = Trainer(
        decoder,
        table,
        sharder,
        loss=Likelihood("mean"),
        rows=table.scope("block_linear"),
        layerwise=layerwise,
        chunk=16,
        **options,
    )
    recipe = Recipe(sign, steps, 1e-3, nll_ceiling=ceiling, weight_decay=0.01)
    batches = training_batches([(examples, 8)], seed=0)
    record = record or (lambda step, values: measures.append(dict(values)))
    result, outcome = trainer.run(params, batches, recipe, "tune", saving, record)
    return {path: np.asarray(x) for path, x in unnest(result).items()}, outcome, measures


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.05},  # below the gradients' norms
        {"clip_norm": 0.0, "accumulate": 2},
        {"clip_norm": 1.0, "accumulate": 2, "devices": 4, "tensor": 2},
    ],
    ids=["clipped", "not clipped, two micro-batches", "fsdp and tensor"],
)
def test_the_layerwise_update_is_that_of_the_whole_tree(tiny, optimizer, options):
    whole, outcome, measures = tuned(tiny, False, optimizer=optimizer, **options)
    ours, our_outcome, our_measures = tuned(tiny, True, optimizer=optimizer, **options)
    assert whole.keys() == ours.keys() and all("layers/" in path for path in ours)
    np.testing.assert_allclose(our_outcome.nll, outcome.nll, rtol=2e-6)
    for mine, theirs in zip(our_measures, measures, strict=True):
        np.testing.assert_allclose(mine["gradient_norm"], theirs["gradient_norm"], rtol=1e-5)
    backbone = {p: np.asarray(x) for p, x in unnest(load_params(tiny, sharder_of(1))[1]).items()}
    for path, x in ours.items():
        update, reference = x - backbone[path], whole[path] - backbone[path]
        # Adam's first updates are signs: an entry of next to no gradient may have either.
        differs = np.abs(update - reference) > 1e-6 + 1e-3 * np.abs(reference)
        assert np.abs(reference).max() > 1e-4 and differs.mean() < 2e-3, path


def test_ascent_stops_at_its_ceiling_and_leaves_parameters(tiny):
    whole, outcome, _ = tuned(tiny, False, steps=12, ceiling=5.75)
    ours, our_outcome, _ = tuned(tiny, True, steps=12, ceiling=5.75)
    assert outcome.stopped_by == our_outcome.stopped_by == "answer NLL above 5.75"
    assert len(outcome.nll) == len(our_outcome.nll) < 12
    for path, x in ours.items():
        np.testing.assert_allclose(x, whole[path], atol=2e-5)


def test_a_run_that_was_cut_resumes_with_the_same_bits(tiny, tmp_path, capsys):
    undisturbed, outcome, _ = tuned(tiny, True, steps=5)
    saving = Saving(tmp_path / "steps", 1e-9)

    def cut(step, values):
        if step == 4:
            raise Cut

    with pytest.raises(Cut):
        tuned(tiny, True, steps=5, saving=saving, record=cut)
    resumed, again, _ = tuned(tiny, True, steps=5, saving=saving)
    out = capsys.readouterr().out
    assert "resumed after step" in out and "damaged" not in out and again == outcome
    for path, x in resumed.items():
        np.testing.assert_array_equal(x, undisturbed[path])


def test_windows_of_attention_and_untied_heads_too(tmp_path):
    for family in ("mistral", "gemma", "qwen2"):
        folder = write_tiny_model(tmp_path / family, model_type=family)
        whole, _, _ = tuned(folder, False, optimizer="adafactor")
        ours, _, _ = tuned(folder, True, optimizer="adafactor")
        for path, x in ours.items():
            np.testing.assert_allclose(x, whole[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_what_it_cannot_do_is_refused(tiny):
    sharder = sharder_of(1)
    config, _ = load_params(tiny, sharder)
    decoder, table = Decoder(config, jnp.float32, sharder), param_table(config)
    with pytest.raises(ValueError, match="embedder/embedding.*derive.backward=whole"):
        Trainer(decoder, table, sharder, layerwise=True)
    with pytest.raises(ValueError, match="compare with a reference"):
        rows = table.scope("block_linear")
        Trainer(decoder, table, sharder, loss=Mismatch(), rows=rows, layerwise=True)


def test_one_blocks_gradient_exists_at_a_time():
    """Temporaries of every program of the step are those of a block, however many there are."""
    sizes = {layers: _temporaries(layers) for layers in (4, 12)}
    block = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512)
    for name, size in sizes[12].items():
        assert size < 1.1 * sizes[4][name] + 4096 and size < 3 * block, sizes


def _temporaries(layers):
    sharder = sharder_of(1)
    raw = tiny_config(num_hidden_layers=layers, hidden_size=128, intermediate_size=512)
    config = config_from_hf(raw, "test")
    table = param_table(config)
    trainer = Trainer(
        Decoder(config, jnp.float32, sharder),
        table,
        sharder,
        optimizer="adafactor",
        clip_norm=0.0,
        rows=table.scope("block_linear"),
        layerwise=True,
    )
    sizes = {}
    for part in trainer.parts(abstract_batch(2, (16, 8), sharder)):
        memory = part.trace().lower().compile().memory_analysis()
        sizes[part.name] = memory.temp_size_in_bytes
    return sizes
