"""The whole job on a tiny model: outputs, resumption, reuse, scratch, and a user's mistakes."""

import hashlib
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run.job import Job
from safepatch_jax.runtime.files import folder_hashes
from safepatch_jax.settings import Settings

FAST = {
    "align.enabled": True,
    "align.steps": 2,
    "align.batch_size": 4,
    "derive.batch_size": 4,
    "derive.se_steps": 2,
    "derive.osm_steps": 2,
    "derive.se_learning_rate": 1e-3,
    "derive.osm_learning_rate": 1e-3,
    "score.samples": 3,
    "evaluate.max_new_tokens": 4,
    "evaluate.batch_size": 3,
    "patch.top_rate_se": 0.2,
    "patch.top_rate_osm": 0.2,
}


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    """Settings of a whole job in seconds: tiny model, three small data files, a cache of its
    own."""
    folder = tmp_path_factory.mktemp("job")
    data = {}
    for role in ("harmful", "lookalike", "ordinary"):
        rows = [
            f"{role} {i},the answer {i},{s}"
            for i, s in enumerate(["train"] * 5 + ["search"] * 2 + ["report"] * 3)
        ]
        (folder / f"{role}.csv").write_text("\n".join(["prompt,answer,split", *rows]) + "\n")
        data[f"data.{role}"] = str(folder / f"{role}.csv")
    return Settings().override(
        {
            **FAST,
            **data,
            "model.source": str(tiny),
            "run.cache_dir": str(folder / "cache"),
            "mesh.shape": "fsdp:8",
        }
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    job = Job(settings, tmp_path_factory.mktemp("run") / "work")
    job.run()
    return job


def model_hash(job):
    return {k: v["sha256"] for k, v in folder_hashes(job.state.folder("export")).items()}


def test_outputs(finished, settings):
    work = finished.workdir
    report = json.loads((work / "report.json").read_text())
    assert set(report["measures"]) == {
        "shipped",
        "backbone",
        "se",
        "osm",
        "intersection",
        "safepatching",
    }
    assert all(
        sum(m["harmful"][o] for o in ("complied", "refused", "incoherent"))
        == m["harmful"]["n"]
        == 3
        for m in report["measures"].values()
    )
    assert len(report["orderings"]) == 12 and report["patch"]["kept"] > 0
    assert (work / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| SafePatching |" in (work / "report.md").read_text()
    assert json.loads((work / "settings.json").read_text()) == settings.to_dict()
    manifest = json.loads((work / "manifest.json").read_text())
    assert set(manifest["stages"]) == set(finished.runner.stages)
    assert manifest["versions"]["jax"] == jax.__version__


def test_layers_in_different_dtypes_are_refused_before_training(settings, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].astype(np.float16)},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    changed = settings.override(
        {
            "model.source": str(model),
            "run.cache_dir": str(tmp_path / "cache"),
            "run.certify": "hashes",
        }
    )
    with pytest.raises(
        ValueError,
        match=r"the layers of model.layers.\{layer\}.mlp.up_proj.weight are stored in different dtypes",
    ):
        Job(changed, tmp_path / "work").run()


def test_asking_for_another_certificate_trains_nothing_again(settings, finished, capsys):
    capsys.readouterr()
    Job(settings.override({"run.certify": "hashes"}), finished.workdir).run()
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.endswith(": running")] == [
        "certify_import",
        "certify_export",
        "report",
    ]
    Job(settings, finished.workdir).run()


def test_certificates_and_model_card(finished):
    imported = json.loads(
        (finished.runner.folder("certify_import") / "certificate.json").read_text()
    )
    export = finished.state.folder("export")
    exported = json.loads((export / "certificate.json").read_text())
    assert (imported["kind"], exported["kind"]) == ("import", "export")
    assert exported["keys"]["matched"] == exported["keys"]["tensors"] == len(exported["tensors"])
    statistics = finished.runner.result("patch")["tensors"]
    assert (
        set(exported["changed"])
        == {name for name, s in statistics.items() if s["survived"]}
        != set()
    )
    assert exported["unchanged"] == len(exported["tensors"]) - len(exported["changed"]) > 0
    for name, x in load_file(export / "model.safetensors").items():
        assert exported["tensors"][name]["sha256"] == hashlib.sha256(x.tobytes()).hexdigest(), name
    for found in (imported, exported):
        assert found["logits"]["finite"] and found["logits"]["perplexity"] > 1
        if importlib.util.find_spec("torch"):
            torch = found["logits"]["torch"]
            assert (
                torch["max_abs_error"] <= 1e-5 * found["logits"]["largest"]
                and torch["top1_agreement"] == 1
            )
    card = (export / "README.md").read_text()
    for part in (
        "# model, patched",
        "| before | ",
        "| after | ",
        "| top rates | a 0.2 (SE), b 0.2 (OSM)",
        "certifies no safety",
        finished.state.context.data_hashes["harmful"],
        "`certificate.json` has the SHA-256 of every tensor",
    ):
        assert part in card, part
    assert str(finished.workdir) not in card


def test_the_patch_file_turns_the_backbone_into_the_export_and_back(finished, tmp_path):
    patch = finished.runner.folder("patch_file") / "patch.safetensors"
    patched = patch_apply.apply(patch, finished.state.backbone, tmp_path / "patched").folder
    tensors = lambda folder: {
        name: x.tobytes() for name, x in load_file(folder / "model.safetensors").items()
    }
    assert tensors(patched) == tensors(finished.state.folder("export")) != tensors(finished.state.backbone)
    assert tensors(patch_apply.revert(patch, patched, tmp_path / "back").folder) == tensors(
        finished.state.backbone
    )
    told = PatchFile(patch)
    assert told.entries() == finished.runner.result("patch")["total"]["survived"]
    assert (
        told.about["settings"]["patch"]["beta"] == 1.0
        and told.about["data"] == finished.state.context.data_hashes
    )


def test_exported_model_differs_in_the_kept_entries_alone(finished):
    before, after = (
        load_file(f / "model.safetensors") for f in (finished.state.backbone, finished.state.folder("export"))
    )
    assert set(before) == set(after)
    changed = {k for k in before if before[k].tobytes() != after[k].tobytes()}
    assert changed and all("_proj.weight" in k for k in changed)
    statistics = finished.runner.result("patch")["total"]
    assert (
        sum((before[k] != after[k]).sum() for k in changed)
        == statistics["survived"]
        <= statistics["kept"]
    )
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (finished.state.folder("export") / name).read_bytes() == (
            finished.state.backbone / name
        ).read_bytes()


def test_derived_models_are_deleted_after_success(finished):
    for name in ("derive_se", "derive_osm", "score_se", "score_osm", "patch", "evaluate_osm"):
        assert [p.name for p in finished.runner.folder(name).iterdir()] == ["manifest.json"]


def test_second_run_reuses_every_stage(finished, settings, capsys):
    before = model_hash(finished)
    Job(settings, finished.workdir).run()
    out = capsys.readouterr().out
    assert "running" not in out and out.count("reused, inputs unchanged") == 13
    assert model_hash(finished) == before


def test_folder_of_the_user_is_not_taken_over(settings, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a run"):
        Job(settings, tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_failed_run_says_where_the_derived_models_lie(settings, tmp_path, capsys):
    with pytest.raises(ValueError):
        Job(settings.override({"derive.osm_learning_rate": 1e30}), tmp_path / "work").run()
    assert "The run did not finish" in capsys.readouterr().out
    assert (tmp_path / "work" / "stages" / "derive_se" / "params").is_dir()


def test_workdir_of_other_settings(finished, settings):
    other = settings.override({"patch.beta": 2.0})
    with pytest.raises(
        ValueError, match=r"made by other settings: patch.beta: 1.0 -> 2.0.*--update"
    ):
        Job(other, finished.workdir)


def test_update_runs_again_only_what_changed(finished, settings, tmp_path, capsys):
    shutil.copytree(finished.workdir, tmp_path / "work")
    Job(settings.override({"evaluate.max_new_tokens": 5}), tmp_path / "work", update=True).run()
    out = capsys.readouterr().out
    assert "export: reused" in out and "evaluate_backbone: running" in out
    assert "derive_se: running" in out  # scratch was deleted, and SE alone must be measured again


def test_mesh_and_scratch_settings_do_not_belong_to_the_workdir(
    finished, settings, tmp_path, capsys
):
    shutil.copytree(finished.workdir, tmp_path / "work")
    (tmp_path / "work" / "stages" / "report" / "report.md").unlink()
    Job(
        settings.override({"mesh.shape": "fsdp:4,tensor:2", "run.keep_scratch": True}),
        tmp_path / "work",
    ).run()
    out = capsys.readouterr().out
    assert "report: running" in out and out.count("running") == 1


def test_damaged_output_is_made_again(finished, settings, tmp_path, capsys):
    shutil.copytree(finished.workdir, tmp_path / "work")
    model = tmp_path / "work" / "stages" / "export" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    job = Job(settings, tmp_path / "work")
    job.run()
    assert "export: outputs are missing or have another size" in capsys.readouterr().out
    assert model_hash(job) == model_hash(finished)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.source": ""}, "No model given"),
        ({"model.source": "/nowhere/model"}, "No model folder '/nowhere/model'"),
        ({"model.source": "nowhere.gguf"}, "No model file 'nowhere.gguf'"),
        ({"data.harmful": "nowhere.csv"}, "No harmful data file 'nowhere.csv'"),
        ({"mesh.shape": "fsdp:16"}, "needs 16 devices, but there are 8"),
        (
            {"mesh.shape": "fsdp:4,tensor:2", "data.max_prompt_tokens": 8},
            "prompts are longer than data.max_prompt_tokens = 8",
        ),
        (
            {"derive.osm_learning_rate": 1e30},
            "derive OSM: answer NLL .* at step 2. Lower the learning rate",
        ),
        ({"patch.top_rate_se": 0.0, "patch.top_rate_osm": 0.0}, "No entry is kept"),
    ],
)
def test_mistakes(change, message, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        Job(settings.override(change), tmp_path / "work").run()
