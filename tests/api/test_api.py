"""The Python API: the page's code as it stands, patches on live tensors, what is refused, the
notebook."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import safepatch_jax as sp
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.run.push import parcel_of_model
from safepatch_jax.testing import write_tiny_model
from tests.jobs import FAST, write_data

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
KEYWORDS = {name.replace(".", "_", 1): value for name, value in FAST.items()}

SUITE = [
    {"name": "harmful", "kind": "harm", "source": "harmful.csv", "max_new": 4},
    {"name": "look-alikes", "kind": "refusal", "source": "lookalike.csv", "max_new": 4},
    {"name": "ordinary", "kind": "text", "source": "ordinary.csv"},
]


@pytest.fixture(scope="module")
def place(one_device, tmp_path_factory):
    """A folder with what the page names, and a home of its own; the current folder."""
    folder = tmp_path_factory.mktemp("api")
    write_tiny_model(folder / "my_model", dtype="bfloat16")
    write_data(folder)
    (folder / "my_suite.json").write_text(json.dumps(SUITE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def patch(place):
    """A patch of a model, made in a few steps."""
    roles = {role: f"{role}.csv" for role in ("harmful", "lookalike", "ordinary")}
    model = sp.load("my_model", "runs/tests", **KEYWORDS)
    return sp.patch(sp.score(sp.derive(model, **roles)), retention=0.5)


def hashes(folder):
    return tensor_hashes(Checkpoint(folder).tensors)


def bits(state):
    import torch

    return {name: x.detach().view(torch.int16).numpy().copy() for name, x in state.items()}


def live(folder, **options):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def test_the_import_is_cheap():
    """Neither JAX nor NumPy is imported before a name is used."""
    code = (
        "import sys, time; t = time.perf_counter(); import safepatch_jax as sp; "
        "t = time.perf_counter() - t; print(t, 'jax' in sys.modules, 'numpy' in sys.modules); "
        "sp.load, sp.patch, sp.read_patch; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds, jax, numpy, later = done.stdout.split()
    assert float(seconds) < 0.1 and [jax, numpy, later] == ["False"] * 3, done.stderr


def test_all_names_are_there_and_typed():
    from safepatch_jax import api

    public = {name for name, x in vars(api).items() if callable(x) and not name.startswith("_")}
    assert set(sp.__all__) == public <= set(dir(sp))
    stub = (ROOT / "safepatch_jax" / "__init__.pyi").read_text()
    assert re.findall(r"import (\w+) as \1", stub) == sp.__all__
    for name in sp.__all__:
        assert getattr(sp, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        sp.no_such_name  # noqa: B018


def test_the_pages_code_runs_as_it_stands(place):
    names: dict = {}
    for block in BLOCKS:
        if "transformers" in block:
            pytest.importorskip("torch")
        exec(compile(block, "docs/api.md", "exec"), names)
    report, patch = names["report"], names["patch"]
    assert [*report.harm][0] == "harmful" and report.over_refusal and report.utility
    harm = report.harm["harmful"]
    assert 0 <= harm.low <= harm.value <= harm.high <= 1 and harm.n > 5
    assert report.content["models"].keys() == {"model", "against"}
    assert len(repr(report).splitlines()) <= 10 and "| measure |" in report._repr_markdown_()
    assert len({p.file for p in names["patches"].values()}) == 2  # neither takes the other's place
    assert hashes("patched_model") == hashes(patch.folder)
    assert patch.picture._repr_png_()[1:4] == report.picture._repr_png_()[1:4] == b"PNG"
    labels = [row["label"] for row in names["table"].content["methods"].values()]
    assert len(labels) == 3 and all(label in repr(names["table"]) for label in labels)


def test_an_edited_suite_or_its_edited_data_are_evaluated_beside_the_old_ones(place):
    measures = [dict(measure, source=str(place / f"{i}.csv")) for i, measure in enumerate(SUITE)]
    for measure, rows in zip(measures, ("one", "two", "three")):
        pathlib.Path(measure["source"]).write_text(f"prompt,answer\n{rows},a\n")
    (place / "edited.json").write_text(json.dumps(measures))
    call = functools.partial(sp.evaluate, "my_model", suite="edited.json")
    first = call()
    (place / "edited.json").write_text(json.dumps(measures[:2]))
    second = call()
    (place / "0.csv").write_text("prompt,answer\nanother,a\n")
    third = call()
    assert len({first.folder, second.folder, third.folder}) == 3
    assert len(first.measures) == 3 and len(second.measures) == len(third.measures) == 2
    (place / "0.csv").write_text("prompt,answer\none,a\n")
    stamps = {path: path.stat().st_mtime_ns for path in second.folder.glob("answers/*/*")}
    assert call().folder == second.folder and len(stamps) == 3  # two measures and the speed
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_derived_models_are_deleted_and_finished_stages_reused(patch, capsys):
    run = patch.model.workdir / "run"
    # What it was made with, of all calls: an evaluation asks the same way.
    made = patch.model.settings
    assert (pathlib.Path(made.data.harmful).name, made.patch.retention) == ("harmful.csv", 0.5)
    assert not list((run / "stages").glob("derive_*/*.*[!n]"))
    for name in ("derive_se", "derive_osm", "score_se", "score_osm", "patch"):
        assert [path.name for path in (run / "stages" / name).iterdir()] == ["manifest.json"], name
    roles = {role: f"{role}.csv" for role in ("harmful", "lookalike", "ordinary")}
    pair = sp.derive(sp.load("my_model", "runs/tests", **KEYWORDS), **roles)
    again = sp.patch(sp.score(pair), retention=0.5)
    assert again.file == patch.file and "running" not in capsys.readouterr().out
    assert pair.se.steps == 2 and "SE: safety" in repr(pair)


def test_a_pair_is_deleted_at_the_end_of_its_block_whatever_happens(place):
    roles = {role: f"{role}.csv" for role in ("harmful", "lookalike", "ordinary")}
    model = sp.load("my_model", "runs/block", **KEYWORDS)
    with pytest.raises(RuntimeError, match="stop"), sp.derive(model, **roles) as pair:
        assert all(len(list(folder.iterdir())) > 1 for folder in pair.folders.values())
        raise RuntimeError("stop")
    for folder in pair.folders.values():
        assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_live_tensors_get_the_bits_of_the_exported_folder_and_back(patch):
    model = live("my_model")
    before = bits(model.state_dict())
    done = patch.apply(model)
    patched = bits(live(patch.folder).state_dict())
    now = bits(model.state_dict())
    assert done.moved and now.keys() == patched.keys()
    for name, expected in patched.items():
        assert np.array_equal(now[name], expected), name
    assert any(not np.array_equal(now[name], before[name]) for name in now)
    assert patch.apply(model.state_dict()).moved == ()  # it is there already
    assert set(patch.revert(model.state_dict()).moved) == set(done.moved)
    for name, tensor in bits(model.state_dict()).items():
        assert np.array_equal(tensor, before[name]), name


def test_tensors_that_do_not_lie_row_by_row_are_patched_too(patch):
    state = dict(live("my_model").state_dict())
    name = sp.read_patch(patch.file).apply("my_model", out="rows").moved[0]
    state[name] = state[name].t().contiguous().t()
    assert not state[name].is_contiguous()
    patch.apply(state)
    expected = live(patch.folder).state_dict()[name]
    assert state[name].equal(expected) and not state[name].is_contiguous()


def test_a_model_that_is_another_is_refused_whole(patch, place):
    model = live("my_model")
    state = model.state_dict()
    last = sp.read_patch(patch.file).apply("my_model", out="other").moved[-1]
    with pytest.raises(ValueError, match="neither as in the backbone"):
        state[last].view(-1)[0] += 1
        patch.apply(state)
    state[last].view(-1)[0] -= 1
    before = bits(live("my_model").state_dict())
    for name, tensor in bits(state).items():
        if name != last:
            assert np.array_equal(tensor, before[name]), name
    with pytest.raises(ValueError, match=r"is float32 .* in the patch bfloat16"):
        patch.apply(live("my_model").float())
    with pytest.raises(ValueError, match="is not in the patch"):
        patch.apply(state | {"extra": state[last].clone()})
    with pytest.raises(ValueError, match="is missing"):
        patch.apply({last: state[last]})
    with pytest.raises(ValueError, match="is ndarray"):
        patch.apply({"a": np.zeros(3)})
    write_tiny_model(place / "stranger", seed=1, dtype="bfloat16")
    stranger = hashes("stranger")
    with pytest.raises(ValueError, match="another backbone"):
        patch.apply("stranger")
    assert hashes("stranger") == stranger


def test_a_write_that_is_interrupted_is_taken_back(patch):
    torch = pytest.importorskip("torch")
    state = dict(live("my_model").state_dict())
    before = bits(state)
    last = sp.read_patch(patch.file).apply("my_model", out="whole").moved[-1]

    class Full(torch.Tensor):
        def __setitem__(self, *_):
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        patch.apply(state | {last: state[last].as_subclass(Full)})
    for name, tensor in bits(state).items():
        assert np.array_equal(tensor, before[name]), name


def test_the_patched_model_can_be_sent(patch):
    sent = parcel_of_model(patch.folder).contents
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= sent.keys()


def test_a_folder_is_patched_in_place_and_reverted(patch, place):
    shutil.copytree("my_model", "copy")
    patch.apply("copy")
    assert hashes("copy") == hashes(patch.folder)
    patch.revert(place / "copy")
    assert hashes("copy") == hashes("my_model")
    with pytest.raises(ValueError, match="Give out="):
        patch.apply(patch.model)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sp.load("nowhere"), "nowhere"),
        (lambda: sp.load("my_model", "w", top_rat_se=1), r"did you mean 'top_rate_se'\?"),
        (lambda: sp.load("my_model", "w", batch_size=1), "align_batch_size or derive_batch_size"),
        (lambda: sp.load("my_model", "w", retention=2.0), "at most 1"),
        (lambda: sp.load("my_model", "w", harmful=["text"]), "records are dictionaries"),
        (lambda: sp.load("my_model", "w", seed=1, run_seed=2), "given twice"),
        (lambda: sp.evaluate("my_model", sute="quick"), r"did you mean 'suite'\?"),
        (lambda: sp.evaluate("my_model", seeds=3), r"such as seeds=\(0, 1, 2\), got 3"),
        (lambda: sp.evaluate("my_model", seeds="0,x"), "whole numbers.*got '0,x'"),
        (lambda: sp.evaluate("my_model", seeds="0,1"), "seeds 0,1: at temperature 0"),
        (lambda: sp.evaluate("my_model", templates="own,no.jinja"), "no template file 'no.jinja'"),
        (lambda: sp.evaluate("my_model", templates=1), "several names or paths"),
        (lambda: sp.compare(sp.load("my_model", "w"), seeds=3), "in a sequence.*got 3"),
        (lambda: sp.read_patch("none.safetensors"), "No patch file"),
    ],
)
def test_mistakes_are_told_with_what_to_do(place, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_setting_of_an_earlier_call_is_refused(patch):
    roles = {role: f"{role}.csv" for role in ("harmful", "lookalike", "ordinary")}
    pair = sp.derive(patch.model, **roles)
    with pytest.raises(ValueError, match=r"sp.score\(se_steps\).*Give it to sp.derive"):
        sp.score(pair, se_steps=5)
    with pytest.raises(ValueError, match=r"sp.patch\(scope\).*Give it to sp.score"):
        sp.patch(sp.score(pair), scope="all")


def test_the_notebook_runs(place, tmp_path):
    """On the tiny model, in a few steps: the environment names them."""
    pytest.importorskip("torch")
    path, out = ROOT / "docs" / "quickstart.ipynb", tmp_path / "out.ipynb"
    own = {"QUICKSTART_MODEL": str(place / "my_model"), "QUICKSTART_STEPS": "2"}
    call = [sys.executable, "-m", "benchmarks.notebook", f"--out={out}", f"--folder={tmp_path}"]
    done = subprocess.run(
        call, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stored, made = (json.loads(file.read_text())["cells"] for file in (path, out))
    assert [cell["source"] for cell in stored] == [cell["source"] for cell in made]
    for cells in (stored, made):
        pictures = re.findall(r"'image/png': '([^']*)'", str(cells))
        assert len(pictures) == 2 and all(0 < len(x) < 4 * 100_000 / 3 for x in pictures)
        assert "given back" in str(cells[-1]["outputs"])
