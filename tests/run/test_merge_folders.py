"""Merging folders tensor by tensor: the bits of the main job, whatever the patches come as, and a
user's mistakes."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file import file as patch_file
from safepatch_jax.run.job import Job
from safepatch_jax.run.merge_folders import merge_folders
from safepatch_jax.settings import Settings
from tests import calls
from tests.run.test_job import FAST

call = functools.partial(calls.call, "launch.merge")
WEIGHTS = "model.safetensors"
STAGES = {
    "--patch_se": "derive_se",
    "--patch_osm": "derive_osm",
    "--scores_se": "score_se",
    "--scores_osm": "score_osm",
}
DARE = Settings().override({"patch.merge": "dare"})  # needs no scores


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished job on 8 devices that kept its derived models and scores."""
    folder = tmp_path_factory.mktemp("run")
    rows = ["prompt,answer,split"]
    for i, split in enumerate(["train"] * 5 + ["search"] * 2 + ["report"] * 3):
        rows.append(f"question {i},the answer {i},{split}")
    data = folder / "data.csv"
    data.write_text("\n".join(rows) + "\n")
    settings = Settings().override(
        {
            **FAST,
            **dict.fromkeys(("data.harmful", "data.lookalike", "data.ordinary"), str(data)),
            "align.enabled": False,
            "model.source": str(tiny),
            "run.cache_dir": str(folder / "cache"),
            "mesh.shape": "fsdp:4,tensor:2",
            "run.keep_scratch": True,
            "run.certify": "hashes",
        }
    )
    job = Job(settings, folder / "work")
    job.run()
    return job.state


@pytest.fixture(scope="module")
def derived(run, tmp_path_factory):
    """The derived models as folders in Hugging Face format."""
    folders = {}
    for role in ("se", "osm"):
        folder = shutil.copytree(run.backbone, tmp_path_factory.mktemp("derived") / role)
        rng = np.random.default_rng(len(role))
        tensors = load_file(folder / WEIGHTS)
        for name, x in tensors.items():
            tensors[name] = x + (1e-3 * rng.standard_normal(x.shape)).astype(x.dtype)
        save(tensors, folder)
        folders[role] = str(folder)
    return folders


def save(tensors, folder):
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def weights(folder):
    tensors = load_file(pathlib.Path(folder) / WEIGHTS)
    return {name: x.tobytes() for name, x in tensors.items()}


def stages(run, kind):
    return {role: str(run.runner.folder(f"{kind}_{role}")) for role in ("se", "osm")}


def test_the_launcher_gives_the_weights_of_the_job(run, tmp_path):
    flags = [f"{flag}={run.runner.folder(stage)}" for flag, stage in STAGES.items()]
    rates = ["--patch.top_rate_se=0.2", "--patch.top_rate_osm=0.2"]
    done = call(f"--base={run.backbone}", *flags, f"--out={tmp_path / 'out'}", *rates)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(run.folder("export"))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["tensors"] == run.runner.result("patch")["tensors"]
    assert record["total"] == run.runner.result("patch")["total"]
    assert (tmp_path / "out" / "patch.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = call(f"--base={run.backbone}", *flags, f"--out={tmp_path / 'out'}")
    assert again.returncode == 2 and "exists and is not empty" in again.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"patch.merge": "dare", "patch.scope": "all"},
        {"patch.merge": "ties"},
        {"patch.merge": "dare_ties", "export.dtype": "bfloat16"},
        {"patch.importance": "random"},
    ],
    ids=lambda o: next(iter(o.values())),
)
def test_folders_and_patch_files_give_the_same(run, derived, options, tmp_path):
    settings = Settings().override(options)
    merge_folders(run.backbone, derived, {}, tmp_path / "folders", settings)
    patches = {role: str(tmp_path / f"{role}.safetensors") for role in derived}
    for role, path in patches.items():
        patch_file.create(run.backbone, derived[role], path)
    merge_folders(run.backbone, patches, {}, tmp_path / "patches", settings)
    assert weights(tmp_path / "folders") == weights(tmp_path / "patches") != weights(run.backbone)
    assert json.loads((tmp_path / "folders" / "config.json").read_text())["torch_dtype"] == (
        options.get("export.dtype", "float32")
    )


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ({}, {"scores": {}}, "ranks entries by SNIP and needs --scores_se and --scores_osm"),
        ({}, {"se": "nowhere"}, "--patch_se=nowhere: no derived model is there"),
        (
            {"patch.merge": "dare"},
            {"se": "backbone", "osm": "backbone"},
            "The SE patch is zero everywhere",
        ),
        (
            {"patch.top_rate_se": 0.0, "patch.top_rate_osm": 0.0},
            {},
            "No entry is kept by 'safepatching'",
        ),
    ],
    ids=["no scores", "no folder", "zero patch", "empty set"],
)
def test_mistakes(options, changes, message, run, tmp_path):
    patches, scores = stages(run, "derive"), changes.get("scores", stages(run, "score"))
    for role in patches.keys() & changes.keys():
        patches[role] = {"backbone": str(run.backbone)}.get(changes[role], changes[role])
    settings = Settings().override(options)
    with pytest.raises(ValueError, match=message):
        merge_folders(run.backbone, patches, scores, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_another_models_folders_are_refused(run, derived, tmp_path):
    tensors = load_file(pathlib.Path(derived["se"]) / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    other = shutil.copytree(derived["se"], tmp_path / "other")
    patches = derived | {"se": str(other)}
    save(tensors | {name: tensors[name][:-1]}, other)
    with pytest.raises(
        ValueError,
        match=r"--patch_se=.*up_proj.weight has shape \(63, 32\), the backbone's is \(64, 32\)",
    ):
        merge_folders(run.backbone, patches, {}, tmp_path / "out", DARE)
    save(tensors | {name: np.full_like(tensors[name], np.nan)}, other)
    with pytest.raises(ValueError, match=f"scores of 1 tensors are NaN or infinite, first {name}"):
        merge_folders(run.backbone, patches, {}, tmp_path / "out", DARE)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_stage_whose_scratch_was_deleted_is_named(run, derived, tmp_path):
    (tmp_path / "derive_se").mkdir()
    (tmp_path / "derive_se" / "manifest.json").write_text("{}")
    patches = derived | {"se": str(tmp_path / "derive_se")}
    with pytest.raises(ValueError, match="deleted it after success, as it does unless it is given"):
        merge_folders(run.backbone, patches, {}, tmp_path / "out", DARE)
