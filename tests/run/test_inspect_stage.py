"""A stage's arrays shown and compared: which tensor of two runs is the first that differs."""

import re
import shutil

import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree, save_tree
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run.inspect_stage import compare, inspect_stage
from tests.calls import call
from tests.conftest import sharder_of

UP = "model.layers.1.mlp.up_proj.weight"
HASH = re.compile(r"^(\S+) +\S+ +\[[\d, ]+\] +([0-9a-f]{64})$", re.MULTILINE)


@pytest.fixture(scope="module")
def changed(kept, tmp_path_factory):
    """A copy of a finished run's workdir, one entry of whose SE scores was changed."""
    folder = tmp_path_factory.mktemp("changed") / "work"
    shutil.copytree(kept.workdir, folder)
    place = folder / "stages" / "score_se" / "sensitivity"
    table = param_table(read_hf_config(kept.state.backbone))
    abstract = unnest(table.abstract(sharder_of(1)))
    scope = {row.path: abstract[row.path] for row in table.scope("block_linear")}
    scores = unnest(load_tree(place, nest(scope)))
    scores["layers/mlp/up"] = scores["layers/mlp/up"].at[1, 2, 3].add(0.5)
    scores["layers/mlp/down"] = scores["layers/mlp/down"].at[0, 0, 0].set(np.nan)
    shutil.rmtree(place)
    save_tree(place, nest(scores))
    return folder


def test_the_hash_of_a_tensor_is_that_of_its_bytes_in_a_model_folder(kept, capsys):
    hashes = tensor_hashes(Checkpoint(kept.state.folder("export")).tensors)
    assert inspect_stage(str(kept.workdir), "export")
    assert dict(HASH.findall(capsys.readouterr().out)) == hashes


@pytest.mark.parametrize("stage", ["derive_osm", "score_se", "patch", "patch_file", "align"])
def test_every_stage_with_arrays_lists_its_tensors_in_the_order_of_the_table(kept, stage, capsys):
    assert inspect_stage(str(kept.workdir), stage)
    names = [name for name, _ in HASH.findall(capsys.readouterr().out)]
    table = param_table(read_hf_config(kept.state.backbone))
    order = list(table.hf_names())
    if stage == "score_se":
        scope = {row.path for row in table.scope("block_linear")}
        order = [name for name, (row, _) in table.hf_names().items() if row.path in scope]
    assert names == order


def test_one_tensor_or_all_layers_of_a_parameter(kept, capsys):
    assert inspect_stage(str(kept.workdir), "score_se", tensor=UP)
    text = capsys.readouterr().out
    assert [name for name, _ in HASH.findall(text)] == [UP] and "mean of absolutes" in text
    assert inspect_stage(str(kept.workdir), "score_se", tensor="layers/mlp/up")
    assert len(HASH.findall(capsys.readouterr().out)) == 2


def test_what_a_patch_changes_is_counted_as_its_file_counts_it(kept, capsys):
    patch = PatchFile(kept.workdir / "stages" / "patch_file" / "patch.safetensors")
    assert inspect_stage(str(kept.workdir), "patch_file", tensor=UP)
    tensor = patch.tensors[UP]
    assert f"changes {tensor.entries:,} of {tensor.size:,} entries" in capsys.readouterr().out


def test_equal_runs_and_the_first_tensor_that_differs(kept, changed, capsys):
    args = (f"--workdir={kept.workdir}", f"--other={changed}")
    assert inspect_stage(str(kept.workdir), "derive_se", other=str(changed))
    text = capsys.readouterr().out
    assert "The keys are equal" in text and "are equal, bit for bit." in text
    result = call("launch.inspect", *args, "--stage=score_se")
    assert result.returncode == 1 and not result.stderr
    last = result.stdout.splitlines()[-1]
    # The table has up before down, though down's first layer comes before up's second.
    assert last.startswith(f"2 of 14 tensors differ. The first: {UP} (float32, [")
    found = re.search(r": 1 of .* the largest difference is (\S+); first at \[2, 3\]: ", last)
    assert float(found[1]) == pytest.approx(0.5, rel=1e-6)  # 0.5 was added, and rounded


def test_a_not_a_number_differs_and_other_tensors_do_not(kept, changed, capsys):
    paths = {"workdir": str(kept.workdir), "other": str(changed), "stage": "score_se"}
    assert not inspect_stage(**paths, tensor="layers/mlp/down")
    assert "nan (0x7fc00000) in B" in capsys.readouterr().out
    assert inspect_stage(**paths, tensor="layers/mlp/gate")


def test_bits_are_compared_not_values():
    a = np.array([[0.0, np.nan], [1.0, 2.0]], np.float32)
    b = a.copy()
    assert compare(a, b) is None
    b[0, 0] = -0.0
    found = compare(a, b)
    assert (found.entries, found.largest, found.index) == (1, 0.0, (0, 0))


@pytest.mark.parametrize(
    "stage, tensor, words",
    [
        ("score_se", "", "deleted after success.*--run.keep_scratch"),
        ("export", "model.layers.1.mlp.up", f"no such tensor. Near it are .*{UP}"),
        ("report", "", "holds no arrays, but .*report.md"),
        ("score_seh", "", "no finished stage .* is absent. There are the stages .*score_se"),
        ("../stages", "", "--stage"),
    ],
)
def test_what_cannot_be_shown_is_said(finished, stage, tensor, words):
    with pytest.raises(ValueError, match=words):
        inspect_stage(str(finished.workdir), stage, tensor=tensor)


def test_damaged_arrays_are_not_compared(changed, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(changed, folder)
    for path in (folder / "stages" / "score_osm" / "sensitivity").rglob("d/*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match="has other bytes than were written"):
        inspect_stage(str(folder), "score_osm")
