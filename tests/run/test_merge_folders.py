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
STAGES = {
    f"--{kind}_{role}": f"{stage}_{role}"
    for kind, stage in (("patch", "derive"), ("scores", "score"))
    for role in ("se", "osm")
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished job on 8 devices that kept its derived models and scores."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        f"question {i},the answer {i},{s}"
        for i, s in enumerate(["train"] * 5 + ["search"] * 2 + ["report"] * 3)
    ]
    (folder / "data.csv").write_text("\n".join(["prompt,answer,split", *rows]) + "\n")
    data = {
        f"data.{role}": str(folder / "data.csv") for role in ("harmful", "lookalike", "ordinary")
    }
    job = Job(
        Settings().override(
            {
                **FAST,
                **data,
                "align.enabled": False,
                "model.source": str(tiny),
                "run.cache_dir": str(folder / "cache"),
                "mesh.shape": "fsdp:4,tensor:2",
                "run.keep_scratch": True,
                "run.certify": "hashes",
            }
        ),
        folder / "work",
    )
    job.run()
    return job


@pytest.fixture(scope="module")
def derived(run, tmp_path_factory):
    """The derived models as folders in Hugging Face format."""
    found = {}
    for role in ("se", "osm"):
        found[role] = shutil.copytree(run.backbone, tmp_path_factory.mktemp("derived") / role)
        rng = np.random.default_rng(len(role))
        tensors = load_file(found[role] / "model.safetensors")
        save_file(
            {
                n: x + (1e-3 * rng.standard_normal(x.shape)).astype(x.dtype)
                for n, x in tensors.items()
            },
            found[role] / "model.safetensors",
            metadata={"format": "pt"},
        )
    return {role: str(path) for role, path in found.items()}


def weights(folder):
    return {
        name: x.tobytes()
        for name, x in load_file(pathlib.Path(folder) / "model.safetensors").items()
    }


def test_the_launcher_gives_the_weights_of_the_job(run, tmp_path):
    stages = [f"{flag}={run.runner.folder(stage)}" for flag, stage in STAGES.items()]
    told = ["--patch.top_rate_se=0.2", "--patch.top_rate_osm=0.2"]
    done = call(f"--base={run.backbone}", *stages, f"--out={tmp_path / 'out'}", *told)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(run.folder("export"))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["tensors"] == run.runner.result("patch")["tensors"]
    assert record["total"] == run.runner.result("patch")["total"]
    assert (tmp_path / "out" / "patch.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = call(f"--base={run.backbone}", *stages, f"--out={tmp_path / 'out'}")
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
    "change, message",
    [
        (dict(scores={}), "ranks entries by SNIP and needs --scores_se and --scores_osm"),
        (dict(patches={"se": "nowhere"}), "--patch_se=nowhere: no derived model is there"),
        (dict(settings={"patch.merge": "dare"}, patches="same"), "The SE patch is zero everywhere"),
        (
            dict(settings={"patch.top_rate_se": 0.0, "patch.top_rate_osm": 0.0}),
            "No entry is kept by 'safepatching'",
        ),
    ],
    ids=["no scores", "no folder", "zero patch", "empty set"],
)
def test_mistakes(change, message, run, derived, tmp_path):
    stages = lambda kind: {role: str(run.runner.folder(f"{kind}_{role}")) for role in ("se", "osm")}
    patches = (
        stages("derive") | change.get("patches", {})
        if change.get("patches") != "same"
        else dict.fromkeys(("se", "osm"), str(run.backbone))
    )
    with pytest.raises(ValueError, match=message):
        merge_folders(
            run.backbone,
            patches,
            change.get("scores", stages("score")),
            tmp_path / "out",
            Settings().override(change.get("settings", {})),
        )
    assert not list(tmp_path.iterdir())


def test_another_models_folders_are_refused(run, derived, tmp_path):
    tensors = load_file(pathlib.Path(derived["se"]) / "model.safetensors")
    name, other = (
        "model.layers.0.mlp.up_proj.weight",
        shutil.copytree(derived["se"], tmp_path / "other"),
    )
    merge = lambda: merge_folders(
        run.backbone,
        derived | {"se": str(other)},
        {},
        tmp_path / "out",
        Settings().override({"patch.merge": "dare"}),
    )
    save_file(
        tensors | {name: tensors[name][:-1]}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        ValueError,
        match=r"--patch_se=.*up_proj.weight has shape \(63, 32\), the backbone's is \(64, 32\)",
    ):
        merge()
    save_file(
        tensors | {name: np.full_like(tensors[name], np.nan)},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=f"importance of entries in 1 tensors is NaN or infinite, first {name}"):
        merge()
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_stage_whose_scratch_was_deleted_is_named(run, derived, tmp_path):
    (tmp_path / "derive_se").mkdir()
    (tmp_path / "derive_se" / "manifest.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="deleted it after success, as it does unless it is given --run.keep_scratch",
    ):
        merge_folders(
            run.backbone,
            derived | {"se": str(tmp_path / "derive_se")},
            {},
            tmp_path / "out",
            Settings().override({"patch.merge": "dare"}),
        )
