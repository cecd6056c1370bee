"""The order of the OSM patch's batches, and what a run says of how its two patches stand to each
other."""

import json

import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.outcome import settings_differences
from safepatch_jax.run import models, report
from safepatch_jax.run.job import Job
from safepatch_jax.runtime.files import read_json
from tests.patching import oracle

OWN = {"derive.osm_seed": 1}


def derived(job, role):
    """The scope of a derived model, flat."""
    table = param_table(read_hf_config(job.state.backbone))
    abstract = table.abstract(job.state.context.sharder)
    flat = unnest(load_tree(job.runner.folder(f"derive_{role}") / "params", abstract))
    return {row.path: np.asarray(flat[row.path]) for row in table.scope("block_linear")}


def test_statistics_are_those_of_the_stored_models(kept):
    backbone = unnest(kept.state.context.load(kept.state.backbone)[1])
    models = {role: derived(kept, role) for role in ("se", "osm")}
    parts = []
    for tree in (backbone, models["se"], models["osm"]):
        parts.append(np.concatenate([np.asarray(tree[path]).ravel() for path in models["se"]]))
    cosine, counts, norms = oracle.compared(*parts)
    total = kept.runner.result("patch")["total"]
    assert total["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert (total["nonzero_both"], total["same_sign"]) == counts
    assert [total["norm_se"], total["norm_osm"]] == pytest.approx(norms, rel=1e-6)
    cosines = [s["cosine"] for s in read_json(kept.workdir / "statistics.json").values()]
    assert (total["cosine_least"], total["cosine_largest"]) == (min(cosines), max(cosines))


def test_the_report_says_what_the_figures_mean(kept):
    text = (kept.workdir / "report.md").read_text()
    total = kept.runner.result("patch")["total"]
    assert f"cosine {total['cosine']:.3f} (-1: opposite" in text
    assert "their first steps are opposite by construction" in text
    ratio = f"{total['norm_ratio']:.3g}"
    assert f"beta / alpha = {ratio} would give both patches the same norm (this run: 1)" in text


def test_the_report_of_other_settings_and_of_earlier_versions(kept):
    content = read_json(kept.workdir / "report.json")
    content["settings"]["derive"]["osm_seed"] = 3
    content["settings"]["patch"]["merge"] = "resta"
    content["patch"]["cosine"] = -0.8
    text = report.markdown(content)
    assert "an order of its own (derive.osm_seed 3)" in text and "by construction" not in text
    assert "they point mostly against each other: 64% of either's squared norm" in text
    assert "SE / OSM" in text and "beta / alpha" not in text
    content["patch"]["cosine"] = 0.05
    assert "they are next to unrelated" in report.markdown(content)
    del content["patch"]["cosine"]
    assert "squared norm" not in report.markdown(content)


def test_an_order_of_its_own_is_another_one(kept, settings, tmp_path):
    def first_step(job, role):
        return job.runner.result(f"derive_{role}")["nll"][0]

    # The same model on the same batch.
    assert first_step(kept, "osm") == first_step(kept, "se")
    job = Job(settings.override(OWN), tmp_path / "work")
    job.runner.need("derive_osm")
    assert first_step(job, "osm") != first_step(kept, "osm")


def test_no_key_changes_at_the_default_and_few_otherwise(kept, settings, tmp_path):
    """Keys as they were before there was the option: its name is in none of their settings."""
    for stage in kept.runner.stages.values():
        assert not any("osm_seed" in name for name in stage.settings), stage.name
    other = Job(settings.override(OWN), tmp_path / "work").runner
    changed = {name for name in other.stages if other.key(name) != kept.runner.key(name)}
    assert "derive_osm" in changed and "patch" in changed
    assert not changed & {"align", "derive_se", "score_se", "evaluate_se", "evaluate_backbone"}
    assert other.stages["derive_osm"].settings["osm_seed"] == 1


def test_a_window_is_in_the_keys_of_its_patch_alone(kept, settings, tmp_path):
    windowed = settings.override({"derive.se_tokens": "after:1", "score.osm_tokens": "head:2"})
    other = Job(windowed, tmp_path / "work")
    changed = {x for x in other.runner.stages if other.runner.key(x) != kept.runner.key(x)}
    assert {"derive_se", "score_se", "score_osm", "patch"} <= changed
    assert not changed & {"align", "derive_osm", "evaluate_backbone", "evaluate_osm"}
    stages = other.runner.stages
    assert stages["score_se"].settings["tokens"] == "after:1"  # as derived
    assert stages["score_osm"].settings["tokens"] == "head:2"
    for role, window in (("se", "after:1"), ("osm", "head:2")):
        samples = models.calibration(other.state, windowed.score, role)
        assert set(samples) <= set(models.training_examples(other.state, role, window)), role
    other.runner.need("derive_se")
    first = {job: job.runner.result("derive_se")["nll"][0] for job in (kept, other)}
    assert first[kept] != first[other]


def test_the_form_of_prompts_is_in_the_keys_of_its_patch_alone(settings, tmp_path):
    rows = []
    for i in range(12):
        for prompt in (f"How is thing number {i} done?", f"Do thing number {i} now."):
            rows.append({"prompt": prompt, "answer": f"Sure, {i}."})
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = settings.override({"data.harmful": str(tmp_path / "both.jsonl")})
    one = Job(settings, tmp_path / "one")
    other = Job(settings.override({"derive.osm_prompts": "questions"}), tmp_path / "other")
    changed = {x for x in other.runner.stages if other.runner.key(x) != one.runner.key(x)}
    assert {"derive_osm", "score_osm", "patch"} <= changed
    assert not changed & {"align", "derive_se", "score_se", "evaluate_backbone"}
    chosen = models.training_examples(other.state, "osm", "all")
    every = models.training_examples(other.state, "se", "all")
    assert 0 < len(chosen) < len(every) and all("?" in e.prompt for e in chosen)
    samples = models.calibration(other.state, other.settings.score, "osm")
    assert set(samples) <= set(chosen)


def test_a_workdir_of_before_the_option_has_its_default(settings):
    before, after = settings.to_dict(), settings.override(OWN).to_dict()
    del before["derive"]["osm_seed"]
    assert settings_differences(before, settings.to_dict()) == []
    assert settings_differences(before, after) == ["derive.osm_seed: -1 -> 1"]


def test_the_report_tells_of_thoughts(kept):
    content = read_json(kept.workdir / "report.json")
    assert "Thoughts without an end" not in report.markdown(content)
    content["measures"]["osm"]["lookalike"]["unfinished"] = 3
    content["settings"]["evaluate"]["thinking"] = "skip"
    content["settings"]["data"]["template_kwargs"] = '{"n": 1}'
    lines = report.markdown(content).split("\n")
    end = next(i for i, line in enumerate(lines) if line.startswith("Thoughts without an end"))
    assert "(incoherent): 3 (" in lines[end] and not lines[end - 1]
    assert any(r'given \{"n": 1\}.' in line and "thoughts skipped" in line for line in lines)
