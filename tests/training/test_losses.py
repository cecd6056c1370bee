"""Losses against their published formulas, and the way through the train step of those that take a
reference."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safepatch_jax.data.chat import BENIGN, HARMFUL, MISMATCH, lengths, training_batch
from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.run.context import Context
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import NPO, Likelihood, Mismatch, SimNPO, row_weights
from safepatch_jax.training.objective import answer_divergences
from safepatch_jax.training.reference import with_reference
from safepatch_jax.training.step import Saving, Trainer
from tests.training.test_checkpoints import ALWAYS, Cut, assert_same_bits, cut_after
from tests.training.test_step import make

RANDOM = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 3, 8])
WEIGHTS = (np.arange(8)[None] < LENGTHS[:, None]).astype(np.float32)
LOGPROBS = (-RANDOM.exponential(2.0, (4, 8)) * WEIGHTS).astype(np.float32)
REFERENCE = -RANDOM.exponential(8.0, 4)
BATCH = {"weights": jnp.asarray(WEIGHTS), "reference": jnp.asarray(REFERENCE[:, None], jnp.float32)}


def log_sigmoid(x):
    return -np.log1p(np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize(
    "loss, formula",
    [
        (Likelihood("mean"), lambda total: -total / LENGTHS),
        (Likelihood("sum"), lambda total: -total),
        (NPO(), lambda total: -2 / 0.1 * log_sigmoid(-0.1 * (total - REFERENCE))),
        (NPO(0.5), lambda total: -2 / 0.5 * log_sigmoid(-0.5 * (total - REFERENCE))),
        (SimNPO(), lambda total: -2 / 2.5 * log_sigmoid(-2.5 * total / LENGTHS)),
        (SimNPO(1.0, 0.3), lambda total: -2 * log_sigmoid(-total / LENGTHS - 0.3)),
    ],
)
def test_formulas(loss, formula):
    values = loss(jnp.asarray(LOGPROBS), BATCH)
    np.testing.assert_allclose(values, formula(LOGPROBS.astype(np.float64).sum(axis=1)), rtol=1e-5)


def test_npo_tends_to_ascent_as_beta_falls():
    """Zhang et al., proposition 1: up to a constant, its gradient is that of the NLL with the sign
    turned."""
    gradient = jax.grad(lambda x: jnp.sum(NPO(1e-4)(x, BATCH)))(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(gradient, jnp.ones_like(gradient), rtol=2e-3)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_reference_is_what_the_start_gives_and_npo_lowers_the_likelihood(tiny, devices):
    _, decoder, params, examples = make(tiny, devices)
    examples = with_reference(decoder, params, examples, 8, decoder.sharder)
    batch = next(training_batches([(examples, 8)], 0))
    assert batch["reference"].shape == (8, 1) and (batch["reference"] < 0).all()
    trainer = Trainer(decoder, param_table(decoder.config), decoder.sharder, loss=NPO())
    _, outcome = trainer.run(
        params, training_batches([(examples, 8)], 0), Recipe(1.0, 5, 1e-3), "npo"
    )
    assert outcome.nll[-1] > outcome.nll[0] + 0.02
    first = {tuple(e.prompt_ids): e.reference for e in examples}
    again = with_reference(decoder, params, examples[:3], 2, decoder.sharder)
    assert [e.reference for e in again] == pytest.approx(
        [first[tuple(e.prompt_ids)] for e in again], rel=1e-5
    )


# The tiny model's answers are so alike that others would make the harmful ones likelier, too.
STRONG = Mismatch(5.0)
PARTS = (HARMFUL,) * 4 + (MISMATCH,) * 2 + (BENIGN,) * 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Another tiny model, to compare with."""
    return write_tiny_model(tmp_path_factory.mktemp("backbone") / "model", seed=1)


def make_mismatch(tiny, devices=1, tensor=1, loss=Mismatch(), **options):
    """Return a trainer, its decoder, parameters and eight examples of three parts."""
    _, decoder, params, examples = make(
        tiny, devices, tensor=tensor, remat=options.pop("remat", "none")
    )
    trainer = Trainer(decoder, param_table(decoder.config), decoder.sharder, loss=loss, **options)
    examples = [dataclasses.replace(e, part=part) for e, part in zip(examples, PARTS)]
    return trainer, decoder, params, examples


def of_parts(examples):
    """An endless iterator of batches in which each part has its rows."""
    pools = {HARMFUL: [], MISMATCH: [], BENIGN: []}
    for example in examples:
        pools[example.part].append(example)
    return training_batches([(pool, len(pool)) for pool in pools.values()], seed=0)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("weights", [(), (0.3, 2.0, 0.7)])
def test_mismatch_is_its_formula(weights):
    part = np.array([0, 2, 0, 1, 2, 0])
    tokens = np.array([5, 1, 3, 8, 2, 8])
    there = np.arange(8)[None] < tokens[:, None]
    logits, theirs = RANDOM.normal(size=(2, 6, 8, 11)) * 3
    logprobs = log_softmax(logits)[..., 0] * there
    kl = (np.exp(log_softmax(theirs)) * (log_softmax(theirs) - log_softmax(logits))).sum(-1) * there
    nll, kl_mean = -logprobs.sum(1) / tokens, kl.sum(1) / tokens
    batch = {"weights": jnp.asarray(there, jnp.float32), "part": jnp.asarray(part[:, None])}
    batch["row_weights"] = row_weights(batch["part"])
    values = Mismatch(*weights)(
        jnp.asarray(logprobs, jnp.float32), batch, jnp.asarray(kl, jnp.float32)
    )
    ascent, mismatch, divergence = weights or (0.5, 1.0, 1.0)
    terms = (
        -ascent * nll[part == 0].mean(),
        mismatch * nll[part == 1].mean(),
        divergence * kl_mean[part == 2].mean(),
    )
    assert values.shape == (6,) and float(values.mean()) == pytest.approx(sum(terms), rel=1e-5)


def test_batches_have_parts_where_examples_do(tiny):
    *_, examples = make_mismatch(tiny)
    batch, plain = next(of_parts(examples)), next(training_batches([(make(tiny)[-1], 8)], 0))
    assert batch["part"].dtype == np.int32 and batch["part"].tolist() == [[part] for part in PARTS]
    assert batch.keys() - plain.keys() == {"part"}


def gradients_of_torch(folder, backbone, batch, out):
    """Return Mismatch's gradient in float64, nested as our parameters are, and the NLL a token of
    the harmful rows."""
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    model, other = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (folder, backbone)
    )
    tokens, valid, at, targets = (
        torch.tensor(batch[name]).long() for name in ("tokens", "valid", "predict_at", "targets")
    )
    there, rows = torch.tensor(batch["weights"]).double(), torch.arange(len(tokens))[:, None]
    ours, theirs = (
        torch.log_softmax(m(tokens, attention_mask=valid).logits[rows, at], -1)
        for m in (model, other)
    )
    nll, kl = (
        -torch.gather(ours, 2, targets[..., None])[..., 0] * there,
        ((theirs - ours) * theirs.exp()).sum(-1) * there,
    )

    def mean(x, part):
        return (x.sum(1) / there.sum(1))[batch["part"][:, 0] == part].mean()

    (-0.5 * mean(nll, HARMFUL) + mean(nll, MISMATCH) + mean(kl, BENIGN)).backward()
    for p in model.parameters():
        p.data = p.grad
    model.float().save_pretrained(out)
    harmful = batch["part"][:, 0] == HARMFUL
    return load_params(out, make(folder)[1].sharder)[1], (
        nll[harmful].sum() / there[harmful].sum()
    ).item()


@pytest.fixture(scope="module")
def expected(tiny, backbone, tmp_path_factory):
    *_, examples = make_mismatch(tiny)
    gradients, nll = gradients_of_torch(
        tiny,
        backbone,
        training_batch(examples, *lengths(examples)),
        tmp_path_factory.mktemp("gradients"),
    )
    return unnest(gradients), nll


@pytest.mark.parametrize(
    "devices, tensor, options",
    [
        (1, 1, {}),
        (8, 1, {}),
        (4, 2, {"accumulate": 2}),
        (1, 1, {"accumulate": 4, "chunk": 8, "remat": "full"}),
    ],
)
def test_the_step_has_the_gradient_of_torch_and_the_nll_of_the_harmful_rows(
    tiny, backbone, expected, devices, tensor, options
):
    """Also on several devices and in micro-batches, the parts of which are in other shares than the
    batch's."""
    trainer, decoder, params, examples = make_mismatch(
        tiny, devices, tensor, clip_norm=1e9, **options
    )
    batch = put_batch(training_batch(examples, *lengths(examples)), decoder.sharder)
    reference = load_params(backbone, decoder.sharder)[1]
    state, metrics = trainer.stepper()(
        trainer._init(params), {}, batch, 1.0, 0.0, 0.0, float("inf"), reference
    )
    assert float(metrics["nll"]) == pytest.approx(expected[1], rel=1e-5)
    first = unnest(optax.tree.get(state["moments"], "mu"))  # after one step: 0.1 of the gradient
    for path, gradient in expected[0].items():
        np.testing.assert_allclose(
            np.asarray(first[path]) / 0.1,
            gradient,
            atol=1e-5 * np.abs(gradient).max(),
            err_msg=path,
        )


def test_a_model_does_not_diverge_from_itself_and_no_gradient_flows_into_the_reference(
    tiny, backbone
):
    _, decoder, params, examples = make_mismatch(tiny)
    batch = training_batch(examples, *lengths(examples))

    def total(params, reference):
        return jnp.sum(answer_divergences(decoder, params, reference, batch)[1])

    def largest(tree):
        return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))

    kl_and_gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    kl, (of_model, _) = kl_and_gradients(params, params)
    assert abs(kl) < 1e-5 and largest(of_model) < 1e-5
    reference = load_params(backbone, decoder.sharder)[1]
    kl, (of_model, of_reference) = kl_and_gradients(params, reference)
    assert kl > 1 and largest(of_model) > 1e-2 and largest(of_reference) == 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_reference_costs_one_forward_pass(tiny, remat):
    trainer, decoder, params, _ = make_mismatch(tiny, remat=remat)
    batch = abstract_batch(8, (48, 32), decoder.sharder)
    parts = {"part": jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=batch["tokens"].sharding)}
    forward = jax.make_jaxpr(
        lambda p: decoder.apply(
            {"params": p},
            *(jnp.zeros((8, 48), x) for x in (jnp.int32, jnp.int32, bool)),
            logits_at_BA=jnp.zeros((8, 32), int),
        )
    )
    plain = make(tiny, remat=remat)[0].trace(batch)
    compared = trainer.trace(batch | parts, params)
    assert count_flops(compared.jaxpr) - count_flops(plain.jaxpr) == count_flops(forward(params))


def test_the_ceiling_is_that_of_the_harmful_answers(tiny, backbone):
    trainer, decoder, params, examples = make_mismatch(tiny, loss=STRONG)
    reference = load_params(backbone, decoder.sharder)[1]

    def run(**ceiling):
        recipe = Recipe(1.0, 5, 1e-3, **ceiling)
        return trainer.run(params, of_parts(examples), recipe, "run", reference=reference)[1]

    free = run()
    assert free.nll[-1] > free.nll[0] + 0.02
    stopped = run(nll_ceiling=(free.nll[2] + free.nll[3]) / 2)
    assert stopped.nll == free.nll[:4] and stopped.stopped_by.startswith("answer NLL above")


def test_a_run_with_a_reference_that_was_cut_resumes_with_the_same_bits(tiny, backbone, tmp_path):
    trainer, decoder, params, examples = make_mismatch(tiny, loss=STRONG)
    reference = load_params(backbone, decoder.sharder)[1]

    def run(saving=None, **options):
        return trainer.run(
            params,
            of_parts(examples),
            Recipe(1.0, 5, 1e-3),
            "run",
            saving,
            reference=reference,
            **options,
        )

    whole, saving = run(), Saving(tmp_path / "steps", ALWAYS)
    with pytest.raises(Cut):
        run(saving, record=cut_after(3))
    steps = []
    tuned, outcome = run(saving, record=lambda done, values: steps.append(done))
    assert_same_bits(tuned, whole[0])
    assert outcome == whole[1] and steps[0] > 1


def test_a_reference_is_given_where_the_loss_compares_and_only_there(tiny):
    trainer, _, params, examples = make_mismatch(tiny)
    with pytest.raises(
        ValueError,
        match="run: the loss Mismatch compares with a reference model and none was given",
    ):
        trainer.run(params, of_parts(examples), Recipe(1.0, 1, 1e-3), "run")
    trainer, _, params, examples = make(tiny)
    with pytest.raises(
        ValueError,
        match="run: the loss Likelihood compares with no reference model and one was given",
    ):
        trainer.run(
            params,
            training_batches([(examples, 8)], 0),
            Recipe(1.0, 1, 1e-3),
            "run",
            reference=params,
        )


def live_embeddings():
    gc.collect()
    return sum(x.shape == (264, 32) for x in jax.live_arrays())


def test_the_context_compares_with_the_model_before_tuning_and_else_keeps_no_copy(
    tiny, tmp_path, one_device
):
    *_, examples = make_mismatch(tiny)
    copies = {}
    for loss in (None, SimNPO(), Mismatch()):
        context = Context(Settings().override({"run.cache_dir": str(tmp_path)}))
        counts = [live_embeddings()]
        context.tune(
            tiny,
            [(examples, 8)],
            Recipe(1.0, 1, 1e-3),
            "tune",
            tmp_path / type(loss).__name__,
            lambda step, values, counts=counts: counts.append(live_embeddings()),
            loss,
        )
        copies[loss] = counts[1] - counts[0]
    # The weights, two moments and the gradient; and the model as it was before.
    assert copies == {None: 4, SimNPO(): 4, Mismatch(): 5}
