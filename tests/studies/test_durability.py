"""What outlives treatments: quantisation against NumPy, entries by hand, effects, whole studies of
tiny models."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.models.config import config_from_hf, read_hf_config
from safepatch_jax.models.table import Param, nest, param_table, unnest
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.runtime import files
from safepatch_jax.studies.durability import effects, report
from safepatch_jax.studies.durability.entries import entries_of, total
from safepatch_jax.studies.durability.options import DurabilityOptions, Scheme, Treatment
from safepatch_jax.studies.durability.pair import Pair
from safepatch_jax.studies.durability.quantise import dequantised, quantised_rows
from safepatch_jax.studies.durability.study import durability
from safepatch_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("one_device")
Q, GATE = "layers/attention/q", "layers/mlp/gate"
FEW = ("int4-g8-asym", "fp16", "finetune")
OPTIONS = DurabilityOptions(treatments=FEW, steps=2, learning_rate=1e-3, batch_size=4)


def by_hand(matrix, scheme):
    """The definition in NumPy: row by row, group by group."""
    out = np.zeros(matrix.shape, np.float32)
    columns = matrix.shape[1]
    size = scheme.group or columns
    for i, row in enumerate(matrix.astype(np.float32)):
        for start in range(0, columns, size):
            part = row[start : start + size]
            if scheme.symmetric:
                top = 2 ** (scheme.bits - 1) - 1
                low, width = np.float32(0), np.abs(part).max()
            else:
                top = 2**scheme.bits - 1
                low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
                width = high - low
            scale = width * np.float32(1 / top)
            if scale:
                inverse = np.float32(1) / scale
                zero = np.round(-low * inverse).astype(int)
                codes = np.round(part * inverse).astype(int) + zero
                if not scheme.symmetric:
                    codes = np.clip(codes, 0, top)
                out[i, start : start + size] = (codes - zero).astype(np.float32) * scale
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", [(8, 0), (8, 128), (4, 32), (4, 24)])
def test_quantisation_is_numpys_bit_by_bit(bits, group, symmetric):
    """Rows of 160: groups of 128 and 24 leave a shorter one at the end."""
    draw = np.random.default_rng(bits + group)
    x = draw.normal(size=(3, 4, 16, 160)).astype(np.float32)  # layers, heads, width, in
    x[0, 0, :4] = np.abs(x[0, 0, :4]) + 1  # of one sign: 0 is in the range all the same
    x[1, 2, 3] = 0
    x[2, 1, 0, :8] = np.arange(-4, 4) * 0.5  # halves
    row = Param("q", ("layers", "heads", "head_dim", "embed"), x.shape, "q.{layer}", 2, "linear")
    scheme = Scheme(bits, group, symmetric)
    for dtype in ("float32", "bfloat16"):
        stored = jnp.asarray(x).astype(dtype)
        ours = np.asarray(dequantised(row, stored, scheme))
        assert ours.dtype == np.float32 and ours.shape == x.shape
        for layer in range(3):
            matrix = np.asarray(stored[layer].astype(jnp.float32)).reshape(64, 160)
            true = by_hand(matrix, scheme)
            assert ours[layer].reshape(64, 160).tobytes() == true.tobytes()
    assert not ours[1, 2, 3].any()
    assert len(np.unique(ours[0, 1, 0, : group or 160])) <= 2**bits


def test_quantisation_takes_the_matrices_of_the_scope(tiny):
    table = param_table(read_hf_config(tiny))
    rows = quantised_rows(table, "block_linear")
    assert {row.kind for row in rows} == {"linear"} and len(rows) == 7
    assert quantised_rows(table, "all") == rows  # embedding and norms are kept; the head is tied
    untied = param_table(config_from_hf(tiny_config(tie_word_embeddings=False)))
    assert {row.kind for row in quantised_rows(untied, "all")} == {"linear", "head"}


@pytest.mark.parametrize(
    "text, name, scheme",
    [
        ("int8", "int8", Scheme(8)),
        ("int4", "int4-g32", Scheme(4, 32)),
        ("int4-g128-asym", "int4-g128-asym", Scheme(4, 128, False)),
        ("int8-g64", "int8-g64", Scheme(8, 64)),
    ],
)
def test_treatments_are_read(text, name, scheme):
    assert Treatment.parse(text) == Treatment(name, scheme)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"treatments": ("int3",)}, "'int3' is none.*There are int8, int4-g32"),
        ({"treatments": ("int4-g0",)}, "'int4-g0' is none"),
        ({"treatments": ("finetuned",)}, "did you mean 'finetune'"),
        ({"treatments": ()}, "names none"),
        ({"measure": "both2"}, "--measure is one of"),
        ({"steps": 0}, "--finetune.steps"),
        ({"learning_rate": float("nan")}, "--finetune.learning_rate"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        DurabilityOptions(**wrong).parsed()


def test_entries_by_hand():
    row = Param("w", ("layers", "embed", "mlp"), (2, 2, 3), "w.{layer}", 1, "linear")
    base = np.zeros((2, 2, 3), np.float32)
    model = np.array([[[1, 0, -2], [0, 0, 4]], [[0, 0, 0], [0, 0, 1]]], np.float32)
    other = np.array([[[1, 3, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0.5]]], np.float32)
    of = entries_of(row, *map(jnp.asarray, (base, model, base, other)))
    assert of["w.0"] == {
        "changed": 3,
        "differ": 2,  # 1 and 2; the 4 is gone
        "same_sign": 1,
        "same_value": 1,
        "outside": 1,  # the 3
        "along": 1 - 4,
        "before": 1 + 4 + 16,
        "after": 1 + 9 + 4,
    }
    every = total(of)
    assert (every["changed"], every["differ"], every["same_sign"], every["same_value"]) == (
        4,
        3,
        2,
        1,
    )
    assert every["along_patch"] == pytest.approx((-3 + 0.5) / 22)
    assert every["cosine"] == pytest.approx(-2.5 / np.sqrt(22 * 14.25))
    assert every["least"] == [pytest.approx(-3 / 21), "w.0"] and every["largest"] == [0.5, "w.1"]
    assert every["size"] == pytest.approx(np.sqrt(14.25 / 22))
    moved = entries_of(row, *map(jnp.asarray, (base, model, base + 5, other + 5)))
    assert moved == of  # what a treatment does to both alike is no part of the patch
    gone = total(entries_of(row, *map(jnp.asarray, (base, model, base, base))))
    assert (gone["along_patch"], gone["cosine"], gone["differ"]) == (0, None, 0)


def values(base, model, name="harm"):
    return {"base": {name: list(base)}, "model": {name: list(model)}}


def test_less_harm_less_refusal_and_less_perplexity_are_better():
    more = {name for name, measure in effects.MEASURES.items() if measure.better > 0}
    assert more == {"harmful_margin", "content_nll"}
    assert {measure.better for measure in effects.MEASURES.values()} == {1, -1}


def test_effects_say_better_worse_or_nothing():
    draw = np.random.default_rng(0)
    base = draw.uniform(0.4, 0.6, 40)
    noise = draw.normal(0, 0.02, 40)
    assert effects.effect("harm", values(base, base - 0.1 + noise))["shown"] == "better"
    assert (
        effects.effect("content_nll", values(base, base - 0.1, "content_nll"))["shown"] == "worse"
    )
    unsure = effects.effect("harm", values(base, base + 5 * noise))
    assert unsure["shown"] == "none shown" and unsure["interval"][0] < 0 < unsure["interval"][1]
    same = effects.effect("harm", values(base, base))
    assert same["shown"] == "none shown" and same["effect"] == 0
    assert effects.effect("harm", values([0.5], [0.1]))["interval"] is None


def test_what_is_left_is_a_ratio_with_fiellers_interval():
    draw = np.random.default_rng(1)
    base, change = np.zeros(60), draw.normal(-0.3, 0.1, 60)
    before = values(base, change)
    half = effects.left("harm", before, values(base, change / 2))
    assert half["value"] == pytest.approx(0.5)
    assert half["interval"] == pytest.approx([0.5, 0.5])  # every prompt keeps half
    after = values(base + 7, 7 + change / 2 + draw.normal(0, 0.1, 60))  # the base moved as well
    loose = effects.left("harm", before, after)
    assert loose["interval"][0] < 0.5 < loose["interval"][1]
    assert 0.02 < loose["interval"][1] - loose["interval"][0] < 0.4
    gone = effects.left("harm", before, values(base, draw.normal(0, 0.01, 60)))
    assert gone["interval"][0] < 0 < gone["interval"][1]
    assert effects.left("harm", values(base, draw.normal(0, 0.1, 60)), before) is None


def test_fiellers_interval_covers():
    """Of 400 draws about 95 % hold the true share."""
    draw, held = np.random.default_rng(2), 0
    for _ in range(400):
        change = draw.normal(-0.3, 0.5, 40)
        later = 0.6 * change + draw.normal(0, 0.3, 40)
        x = effects.left("harm", values(np.zeros(40), change), values(np.zeros(40), later))
        held += x is None or x["interval"][0] <= 0.6 <= x["interval"][1]
    assert 0.92 < held / 400 < 0.98


def content_of(before, after):
    counts = {"changed": 4, "differ": 3, "same_sign": 2, "same_value": 1, "outside": 0}
    entries = total({"w": counts | {"along": 3.0, "before": 4.0, "after": 5.0}})
    results = {
        "none": {"values": before, "entries": entries, "failed": "", "nll": {}},
        "int8": {"values": after, "entries": entries, "failed": "", "nll": {}},
        "fp16": {"failed": "fp16, base: 1 tensors hold numbers beyond the range of float16"},
    }
    about = {
        "models": {"base": "b", "model": "m"},
        "options": {
            "measure": "margins",
            "steps": 1,
            "batch_size": 1,
            "learning_rate": 1.0,
            "seed": 0,
        },
        "data": {"harmful": "h"},
        "record": {"options": {"scope": "block_linear", "split": "report"}},
        "quantised": 7,
        "tensors": 9,
        "trained": "all",
    }
    return report.gather(results, DurabilityOptions(), about)


def test_report_of_a_patch_that_was_no_better():
    base = np.linspace(0.2, 0.8, 30)
    noise = np.random.default_rng(3).normal(0, 0.01, 30)
    before = values(base, base + 0.1 + noise)
    content = content_of(before, values(base, base + 0.05 + noise))
    page = report.markdown(content)
    assert "was no better than its base to begin with" in page and "50% [" in page
    assert "float16" in page and "| int8" in page and "| 75.00% | 50.00% | 25.00% | 75.0% |" in page
    none = content_of(values(base, base + noise - noise.mean()), before)
    page = report.markdown(none)
    assert "no effect of the patch is shown" in page and "there is none to be left" in page
    assert "Nothing: no effect was shown before." in page
    better = content_of(values(base, base - 0.1 + noise), values(base, base + 0.1 - noise))
    assert "is better in harm, expected compliance, worse in none" in report.markdown(better)
    assert "reversed" in report.summary(better)[1]
    gone = content_of(before, values(base, base + noise - noise.mean()))
    assert ", no longer shown" in report.summary(gone)[1]
    reports = [content, none, better]
    assert [len(report.draw(x).axes) for x in reports] == [2, 2, 2]


def changed_model(source, out, sharder, paths=(Q, GATE), by=0.2):
    """Write a copy of a model, every third entry of some weights changed."""
    config, params = load_params(source, sharder)
    flat = unnest(params)
    for path in paths:
        x = np.asarray(flat[path].astype(jnp.float32)).copy()
        x.reshape(-1)[::3] += np.float32(by) * np.sign(x.reshape(-1)[::3])
        flat[path] = jnp.asarray(x).astype(flat[path].dtype)
    save_model(out, nest(flat), config, source)
    return out


@pytest.fixture(scope="module")
def patched(settings, sharder, tmp_path_factory):
    """The base's folder, the patched model's, and the patch file."""
    folder = tmp_path_factory.mktemp("patched")
    base = settings.model.source
    model = changed_model(base, folder / "model", sharder)
    create(base, model, folder / "patch.safetensors", {})
    return base, str(model), str(folder / "patch.safetensors")


@pytest.fixture(scope="module")
def studied(settings, patched, tmp_path_factory):
    """A study; read only."""
    work = tmp_path_factory.mktemp("studied") / "work"
    _, model, _ = patched
    page = durability(settings, work, model, "", OPTIONS)
    return files.read_json(work / "durability.json"), page


def test_study_of_tiny_models(studied, patched):
    content, page = studied
    assert [x["name"] for x in content["treatments"]] == list(FEW)
    assert content["entries"]["along_patch"] == 1 and content["entries"]["outside"] == 0
    table = param_table(read_hf_config(patched[0]))
    assert content["entries"]["changed"] == sum(-(-np.prod(table[p].shape) // 3) for p in (Q, GATE))
    by_name = {x["name"]: x["entries"] for x in content["treatments"]}
    assert by_name["fp16"]["along_patch"] == pytest.approx(1, abs=1e-3)
    assert by_name["int4-g8-asym"]["outside"] > 0 and by_name["fp16"]["outside"] == 0
    assert 0.8 < by_name["int4-g8-asym"]["along_patch"] < 1.2
    tuned = by_name["finetune"]
    assert tuned["differ"] == tuned["changed"] > tuned["same_value"] and tuned["outside"] > 0
    nll = content["treatments"][2]["nll"]
    assert len(nll["base"]) == len(nll["model"]) == 2 and nll["base"] != nll["model"]
    text = page.read_text()
    assert "| finetune: 2 steps of benign fine-tuning at 0.001 |" in text
    assert (page.parent / "durability.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(page.parent.rglob("*.safetensors")) and not list(page.parent.glob("treated"))


def test_harm_is_the_share_of_affirmative_openings(studied):
    measured = studied[1].parent / "measured"
    values = files.read_json(next(measured.glob("none.base.margins.*")))["values"]
    compliance = 1 / (1 + np.exp(values["harmful_margin"]))
    refusals = 1 / (1 + np.exp(np.negative(values["lookalike_margin"])))
    assert values["harm"] == pytest.approx(compliance, abs=1e-6)
    assert values["over_refusal"] == pytest.approx(refusals, abs=1e-6)


def test_a_treatment_is_measured_once(studied, settings, patched, capsys):
    content, page = studied
    more = DurabilityOptions(**vars(OPTIONS) | {"treatments": ("bf16", *FEW)})
    times = {path: path.stat().st_mtime_ns for path in (page.parent / "measured").iterdir()}
    durability(settings, page.parent, patched[1], "", more)
    said = capsys.readouterr().out
    for name in ("none", *FEW):
        assert f"{name}: measured already" in said
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = files.read_json(page.parent / "durability.json")
    assert again["treatments"][1:] == content["treatments"]
    other = DurabilityOptions(**vars(OPTIONS) | {"treatments": FEW[2:], "steps": 1})
    durability(settings, page.parent, patched[1], "", other)
    said = capsys.readouterr().out
    assert "none: measured already" in said and "finetune: measured" not in said
    durability(settings, page.parent, patched[1], "", OPTIONS)  # as it was, for other tests
    assert files.read_json(page.parent / "durability.json")["treatments"] == content["treatments"]


def test_the_patch_file_stands_for_the_model_and_kept_models_are_what_was_measured(
    studied, settings, patched, sharder, tmp_path
):
    content, _ = studied
    base, model, patch = patched
    keep = DurabilityOptions(**vars(OPTIONS) | {"keep": True})
    durability(settings, tmp_path / "work", "", patch, keep)
    again = files.read_json(tmp_path / "work" / "durability.json")
    assert again["before"] == content["before"] and again["entries"] == content["entries"]
    assert again["treatments"] == content["treatments"]  # fine-tuning too: the same bits
    kept = {path.name.partition("-")[0]: path for path in (tmp_path / "work" / "treated").iterdir()}
    assert kept.keys() == {"int4", "fp16", "finetune"}
    before, after = (unnest(load_params(x, sharder)[1]) for x in (model, kept["int4"] / "model"))
    row = param_table(read_hf_config(base))[Q]
    assert jnp.array_equal(after[Q], dequantised(row, before[Q], Scheme(4, 8, False)))
    assert jnp.array_equal(after["embedder/embedding"], before["embedder/embedding"])
    cast = unnest(load_params(kept["fp16"] / "base", sharder)[1])
    assert {str(x.dtype) for x in cast.values()} == {"float16"}


def test_a_patch_file_is_known_by_its_bytes_and_damage_is_told(patched, sharder, tmp_path):
    base, _, patch = patched
    damaged = tmp_path / "damaged.safetensors"
    after = PatchFile(patch).tensors["model.layers.0.self_attn.q_proj.weight"].after.encode()
    damaged.write_bytes(pathlib.Path(patch).read_bytes().replace(after, b"0" * 64))
    right, wrong = Pair(base, "", patch), Pair(base, "", str(damaged))
    assert right.record["base"] == wrong.record["base"]
    assert right.record["model"] != wrong.record["model"]
    with pytest.raises(ValueError, match="does not become what the manifest of .*damaged"):
        wrong.weights(sharder)["model"][Q]


def test_an_overflow_of_fp16_is_told_by_name_and_the_others_are_measured(
    settings, sharder, tmp_path, capsys
):
    base, path = settings.model.source, "layers/mlp/down"
    model = changed_model(base, tmp_path / "model", sharder, (path,), by=1e5)
    options = DurabilityOptions(treatments=("fp16", "bf16"))
    page = durability(settings, tmp_path / "work", str(model), "", options)
    name = "model.layers.0.mlp.down_proj.weight"
    assert (
        f"fp16, patched: 2 tensors hold numbers beyond the range of float16 (65,504): {name}"
        in (page.read_text())
    )
    first, second = files.read_json(page.with_suffix(".json"))["treatments"]
    assert first["failed"] and not second["failed"]
    capsys.readouterr()
    durability(settings, tmp_path / "work", str(model), "", options)
    assert "fp16: measured already" in capsys.readouterr().out


def test_answers_are_judged_in_pairs(settings, patched, tmp_path):
    options = DurabilityOptions(treatments=("bf16",), measure="answers")
    page = durability(settings, tmp_path / "work", patched[1], "", options)
    content = files.read_json(page.with_suffix(".json"))
    names = {"harm_answers", "over_refusal_answers", "ordinary_nll"}
    assert content["measures"].keys() == content["before"].keys() == names
    assert content["before"]["harm_answers"]["n"] == 3 and "refusal phrases" in page.read_text()
    # What a random model writes, where it writes anything, holds no refusal phrase.
    assert content["before"]["harm_answers"]["base"] > 0
    assert content["before"]["over_refusal_answers"]["base"] == 0


def test_what_is_no_pair_is_refused(settings, patched, studied, sharder, tmp_path):
    base, model, patch = patched
    work = tmp_path / "work"
    with pytest.raises(ValueError, match="--model .* or --patch"):
        durability(settings, work)
    with pytest.raises(ValueError, match="hold the same weights"):
        durability(settings, work, base, "", OPTIONS)
    with pytest.raises(ValueError, match="is not the backbone of .*patch.safetensors"):
        durability(settings.override({"model.source": model}), work, "", patch, OPTIONS)
    with pytest.raises(ValueError, match="is not the patched model of"):
        durability(settings, work, base, patch, OPTIONS)
    config, params = load_params(model, sharder)
    save_model(tmp_path / "half", params, config, model, dtype="bfloat16")
    with pytest.raises(ValueError, match="stored in another dtype .*the cast would pass"):
        durability(settings, work, str(tmp_path / "half"), "", OPTIONS)
    assert not work.exists()
    _, page = studied
    with pytest.raises(ValueError, match="with other models .*model"):
        durability(settings.override({"model.source": model}), page.parent, base, "", OPTIONS)
    with pytest.raises(ValueError, match="options .*margin_limit 300 there, 2 here"):
        few = settings.override({"evaluate.margin_limit": 2})
        durability(few, page.parent, model, "", OPTIONS)
