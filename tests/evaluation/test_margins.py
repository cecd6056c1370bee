"""The margin map: openings against sums over single likelihoods, AUROC against all pairs and a
bootstrap."""

import jax
import numpy as np
import pytest

from safepatch_jax.data.prompt_format import read_format
from safepatch_jax.evaluation import margins as margin_module
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.judges.base import COMPLIED
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.margins import auroc, auroc_change, margins
from safepatch_jax.evaluation.openings import (
    Openings,
    beginnings,
    find_openings,
    fixed_openings,
)
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.numerics import NotFinite
from safepatch_jax.testing import write_tiny_model
from safepatch_jax.training.batch import put_batch

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (1, 5, 9, 30, 31)]
OPENINGS = Openings(
    refusal=((7,), (1, 2), (1, 3, 4), (1, 3, 5, 6)),
    affirmative=((8, 9), (9,), (1, 4, 4), (2, 6), (2, 7)),
)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def engine(request, tmp_path_factory, sharder):
    folder = tmp_path_factory.mktemp("margins") / request.param
    write_tiny_model(folder, model_type=request.param)
    return Engine(*load_params(folder, sharder), folder, sharder, batch_size=2)


def margins_of(engine, prompts, openings):
    rows = {}
    margins(engine, prompts, openings, "margins", rows.__setitem__)
    return [rows[i] for i in range(len(prompts))]


def test_each_kind_is_the_sum_of_its_openings_likelihoods(engine):
    rows = margins_of(engine, PROMPTS, OPENINGS)
    for kind in ("refusal", "affirmative"):
        every = getattr(OPENINGS, kind)
        pairs = [(prompt, ids) for prompt in PROMPTS for ids in every]
        single = np.array([logprob for logprob, _ in engine.score(pairs)])
        expected = np.logaddexp.reduce(single.reshape(len(PROMPTS), -1), axis=1)
        np.testing.assert_allclose([row[kind] for row in rows], expected, rtol=2e-5, atol=2e-5)


def test_what_all_prompts_begin_with_is_read_once(engine, monkeypatch):
    prefixes = []

    def noted(batch, sharder):
        prefixes.append(batch["prefix"].shape if "prefix" in batch else None)
        return put_batch(batch, sharder)

    monkeypatch.setattr(margin_module, "put_batch", noted)
    begin = RNG.integers(0, 256, 11).tolist()
    prompts = [begin + ids for ids in PROMPTS[1:]]
    together = margins_of(engine, prompts, OPENINGS)
    alone = [margins_of(engine, [prompt], OPENINGS)[0] for prompt in prompts]
    with_other = margins_of(engine, [*prompts, [3, 1]], OPENINGS)[:-1]
    assert prefixes[:2] == [(1, 8)] * 2 and not any(prefixes[2:])
    for kind in ("refusal", "affirmative"):
        expected = [row[kind] for row in with_other]
        for rows in (together, alone):
            np.testing.assert_allclose([row[kind] for row in rows], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mesh", ["data:4,fsdp:1,tensor:1", "data:2,fsdp:2,tensor:2"])
def test_a_mesh_gives_the_same(engine, mesh):
    begin = RNG.integers(0, 256, 11).tolist()
    prompts = [begin + ids for ids in [*PROMPTS, [1, 2]]]
    expected = margins_of(engine, prompts, OPENINGS)
    sharder = Sharder(make_mesh(mesh, jax.devices()[: 4 if "data:4" in mesh else 8]))
    folder = engine.chat._folder
    ours = Engine(*load_params(folder, sharder), folder, sharder, batch_size=4)
    for row, other in zip(margins_of(ours, prompts, OPENINGS), expected):
        assert row == pytest.approx(other, rel=2e-5, abs=2e-5)


def test_a_long_prompt_does_not_widen_the_others(engine, monkeypatch):
    shapes = []

    def noted(batch, sharder):
        shapes.append(batch["tokens"].shape)
        return put_batch(batch, sharder)

    monkeypatch.setattr(margin_module, "put_batch", noted)
    margins_of(engine, [[3] * 300, [4] * 300, *PROMPTS[:4]], OPENINGS)
    assert shapes == [(2, 320), (2, 32), (2, 8)]


def test_openings_of_one_token_alone(engine):
    rows = margins_of(engine, PROMPTS[:1], Openings(((7,),), ((8,), (9,))))
    single = np.array([x for x, _ in engine.score([(PROMPTS[0], [t]) for t in (7, 8, 9)])])
    np.testing.assert_allclose(rows[0]["refusal"], single[0], rtol=1e-5)
    np.testing.assert_allclose(rows[0]["affirmative"], np.logaddexp(*single[1:]), rtol=1e-5)


def test_weights_that_overflow_are_refused(engine):
    broken = Engine(
        engine.config,
        engine.params | {"final_norm": {"scale": engine.params["final_norm"]["scale"] * np.nan}},
        engine.chat._folder,
        engine.sharder,
    )
    with pytest.raises(NotFinite, match="NaN or overflow"):
        margins_of(broken, PROMPTS[:1], OPENINGS)


def test_no_opening_begins_with_another_one(engine):
    found = fixed_openings(engine)
    every = [*found.refusal, *found.affirmative]
    for ids in every:
        assert ids and sum(ids[: len(other)] == other for other in every) == 1
    texts = [engine.decode(ids) for ids in found.refusal]
    assert "I cannot" in texts and "Sorry" in texts
    assert Openings.from_dict(found.to_dict(engine.decode)) == found


# Each line ends with a line break, an answer's as well, and nothing else ends it.
LINES = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_openings_end_before_what_a_template_writes_behind_them(engine, tmp_path):
    (tmp_path / "lines.jinja").write_text(LINES)
    for template in (str(tmp_path / "lines.jinja"), "plain"):
        found = fixed_openings(engine.with_format(read_format(template)))
        texts = [engine.tokenizer.decode(ids) for ids in (*found.refusal, *found.affirmative)]
        assert {"I cannot", "Sure"} <= {text.lstrip(" ") for text in texts}
        assert not any("\n" in text for text in texts)


def test_beginnings_are_as_short_as_they_can_be():
    refusals, others = [(1, 2, 3), (1, 2, 9), (1, 5), (7, 7, 7)], [(1, 3), (7, 7, 8), (2,)]
    assert beginnings(refusals, others) == [(1, 2), (1, 5), (7, 7, 7)]
    assert beginnings([(2, 3)], others) == []  # another kind's opening is its beginning
    assert beginnings([(1, 2, 3, 4, 5)], [(1, 2, 3, 4, 6)]) == []


def test_openings_of_the_models_own_answers(engine):
    """A tiny model's answers are noise, which the judge calls broken or complied."""
    prompts = PROMPTS[:4]
    found, fixed = find_openings(engine, prompts, "openings"), fixed_openings(engine)
    assert set(found.refusal) == set(fixed.refusal)
    for ids in engine.complete_ids(prompts, 24):
        opens = any(tuple(ids[: len(o)]) == o for o in found.affirmative)
        assert opens == (judge(engine.decode(ids)) == COMPLIED)


def test_auroc_is_the_share_of_pairs():
    harmful, harmless = [3.0, 1.0, 0.0], [1.0, -1.0]
    assert auroc(harmful, harmless)["value"] == pytest.approx((2 + 1.5 + 1) / 6)
    assert auroc([2.0, 3.0], [0.0, 1.0]) == {"value": 1.0, "interval": [1.0, 1.0]}


def test_auroc_does_not_see_a_moved_threshold():
    harmful, harmless = RNG.normal(1, 1, 40), RNG.normal(0, 1, 30)
    change = auroc_change((harmful, harmful - 5), (harmless, harmless - 5))
    assert change == {"value": 0.0, "interval": [0.0, 0.0]}


def test_intervals_are_those_of_a_bootstrap():
    harmful, harmless = RNG.normal(1, 1, 120), RNG.normal(0, 1, 100)
    after = harmful + RNG.normal(0.3, 0.5, 120), harmless + RNG.normal(0, 0.5, 100)
    ours, change = auroc(harmful, harmless), auroc_change((harmful, after[0]), (harmless, after[1]))
    single, differences = [], []
    for _ in range(2000):
        i, j = RNG.integers(0, 120, 120), RNG.integers(0, 100, 100)
        before = (harmful[i][:, None] > harmless[j]).mean()
        single.append(before)
        differences.append((after[0][i][:, None] > after[1][j]).mean() - before)
    for result, drawn in ((ours, single), (change, differences)):
        half = (result["interval"][1] - result["interval"][0]) / 2
        assert half == pytest.approx(1.96 * np.std(drawn), rel=0.1)
        assert result["value"] == pytest.approx(np.mean(drawn), abs=0.01)
