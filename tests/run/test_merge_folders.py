"""Merging folders tensor by tensor: the bits of the main job, whatever the patches come as, and a
user's mistakes."""

import functools
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run.merge_folders import PatchedTensor, merge_folders
from safepatch_jax.runtime.files import read_json
from safepatch_jax.settings import Settings
from tests import calls
from tests.run.test_job import weights

call = functools.partial(calls.call, "launch.merge")
DARE = Settings().override({"patch.merge": "dare"})
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def backbone(kept):
    return kept.state.backbone


@pytest.fixture(scope="module")
def derived(backbone, tmp_path_factory):
    """Derived models as folders in Hugging Face format."""
    folders = {}
    for number, role in enumerate(("se", "osm")):
        folder = shutil.copytree(backbone, tmp_path_factory.mktemp("derived") / role)
        rng = np.random.default_rng(number)
        tensors = load_file(folder / "model.safetensors")
        for name, x in tensors.items():
            tensors[name] = x + (1e-3 * rng.standard_normal(x.shape)).astype(x.dtype)
        write_weights(folder, tensors)
        folders[role] = str(folder)
    return folders


def write_weights(folder, tensors):
    save_file(tensors, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})


def stages(kept, kind):
    return {role: str(kept.runner.folder(f"{kind}_{role}")) for role in ("se", "osm")}


def test_the_launcher_gives_the_weights_of_the_job(kept, backbone, tmp_path):
    """Of one on eight devices."""
    folders = [f"--base={backbone}", f"--out={tmp_path / 'out'}"]
    folders += [f"--patch_{role}={path}" for role, path in stages(kept, "derive").items()]
    folders += [f"--scores_{role}={path}" for role, path in stages(kept, "score").items()]
    done = call(*folders, "--patch.top_rate_se=0.2", "--patch.top_rate_osm=0.2")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(kept.state.folder("export"))
    record = read_json(tmp_path / "out" / "merge.json")
    result = kept.runner.result("patch")
    # A tensor of this model is one piece, so even its sums are the same.
    assert (record["tensors"], record["total"]) == (result["tensors"], result["total"])
    assert (tmp_path / "out" / "patch.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = call(*folders)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
    (tmp_path / "file").touch()
    uncached = call(*folders, f"--run.cache_dir={tmp_path / 'file' / 'cache'}")
    assert uncached.returncode == 2 and "--run.cache_dir" in uncached.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"patch.merge": "dare", "patch.scope": "all"},
        {"patch.merge": "ties"},
        {"patch.merge": "dare_ties", "export.dtype": "bfloat16"},
        {"patch.importance": "random"},
    ],
    ids=["dare", "ties", "dare_ties", "random"],
)
def test_folders_and_patch_files_give_the_same(backbone, derived, options, tmp_path):
    settings = Settings().override(options)
    merge_folders(backbone, derived, {}, tmp_path / "folders", settings)
    patches = {role: str(tmp_path / f"{role}.safetensors") for role in derived}
    for role, path in patches.items():
        create(backbone, derived[role], path)
    merge_folders(backbone, patches, {}, tmp_path / "patches", settings)
    assert weights(tmp_path / "folders") == weights(tmp_path / "patches") != weights(backbone)
    dtype = read_json(tmp_path / "folders" / "config.json")["torch_dtype"]
    assert dtype == options.get("export.dtype", "float32")


def test_a_patch_file_is_read_as_the_model_is(backbone, derived, tmp_path, monkeypatch):
    """In runs of any length: those of rows do not end where the patch file's do."""
    monkeypatch.setattr("safepatch_jax.run.merge_folders.RUN", 100)
    monkeypatch.setattr("safepatch_jax.patch_file.file.RUN", 100)
    create(backbone, derived["se"], tmp_path / "se.safetensors")
    patch, stored = PatchFile(tmp_path / "se.safetensors"), Checkpoint(backbone).tensors[UP]
    expected = Checkpoint(derived["se"]).tensors[UP].read().reshape(-1)
    tensor = PatchedTensor(patch, UP, stored)
    for start, size in ((0, 96), (96, 210), (700, 1), (900, 1148), (3, 400), (403, 0), (2047, 1)):
        ours = tensor.read(np.empty(size, expected.dtype), start)
        np.testing.assert_array_equal(ours, expected[start : start + size])


def test_mistakes(kept, backbone, tmp_path):
    patches, scores = stages(kept, "derive"), stages(kept, "score")
    same = {"se": str(backbone), "osm": str(backbone)}
    nothing = Settings().override({"patch.top_rate_se": 0.0, "patch.top_rate_osm": 0.0})
    (tmp_path / "deleted").mkdir()
    (tmp_path / "deleted" / "manifest.json").write_text("{}")
    deleted = {"se": str(tmp_path / "deleted")}
    for derived, scored, settings, message in (
        (patches, {}, Settings(), "ranks entries by SNIP and needs --scores_se and --scores_osm"),
        ({"se": "nowhere"}, {}, DARE, "--patch_se=nowhere: no derived model is there"),
        (deleted, {}, DARE, "deleted it after success, as it does unless .*--run.keep_scratch"),
        (same, {}, DARE, "The SE patch is zero everywhere"),
        (patches, scores, nothing, "No entry is kept by 'safepatching'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_folders(backbone, patches | derived, scored, tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["deleted"]


def test_another_models_folders_are_refused(backbone, derived, tmp_path):
    other = pathlib.Path(shutil.copytree(derived["se"], tmp_path / "other"))
    patches = derived | {"se": str(other)}
    tensors = load_file(other / "model.safetensors")
    cut, broken = tensors[UP][:-1], np.full_like(tensors[UP], np.nan)
    for tensor, message in (
        (cut, r"--patch_se=.*up_proj.weight has shape \(63, 32\), the backbone's is \(64, 32\)"),
        (broken, f"importance of entries in 1 tensors is NaN or infinite, first {UP}"),
    ):
        write_weights(other, tensors | {UP: tensor})
        with pytest.raises(ValueError, match=message):
            merge_folders(backbone, patches, {}, tmp_path / "out", DARE)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
