"""The whole job on a tiny model: outputs, resumption, reuse, scratch, and a user's mistakes."""

import hashlib
import importlib.util
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.data.records import load_records
from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run.job import Job
from safepatch_jax.run.table import VARIANTS
from safepatch_jax.runtime.files import folder_hashes, read_json
from tests.jobs import machine_of, stages_run

SCRATCH = ("derive_se", "derive_osm", "score_se", "score_osm", "patch", "evaluate_osm")


def model_hash(job):
    return {name: x["sha256"] for name, x in folder_hashes(job.state.folder("export")).items()}


def weights(folder):
    return {name: x.tobytes() for name, x in load_file(folder / "model.safetensors").items()}


def copy_of(job, tmp_path):
    return shutil.copytree(job.workdir, tmp_path / "work")


def test_outputs(finished, settings):
    work = finished.workdir
    report = read_json(work / "report.json")
    assert set(report["measures"]) == set(VARIANTS)
    for measures in report["measures"].values():
        harm = measures["harmful"]
        assert harm["complied"] + harm["refused"] + harm["incoherent"] == harm["n"] == 3
    assert len(report["orderings"]) == 12 and report["patch"]["kept"] > 0
    assert (work / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| SafePatching |" in (work / "report.md").read_text()
    assert read_json(work / "settings.json") == settings.to_dict()
    manifest = read_json(work / "manifest.json")
    assert set(manifest["stages"]) == set(finished.runner.stages)
    assert manifest["versions"]["jax"] == jax.__version__


def test_certificates_and_model_card(finished):
    imported = read_json(finished.runner.folder("certify_import") / "certificate.json")
    export = finished.state.folder("export")
    exported = read_json(export / "certificate.json")
    assert (imported["kind"], exported["kind"]) == ("import", "export")
    assert exported["keys"]["matched"] == exported["keys"]["tensors"] == len(exported["tensors"])
    changed = set()
    for name, statistics in finished.runner.result("patch")["tensors"].items():
        if statistics["survived"]:
            changed.add(name)
    assert set(exported["changed"]) == changed and changed
    assert exported["unchanged"] == len(exported["tensors"]) - len(changed) > 0
    for name, x in weights(export).items():
        assert exported["tensors"][name]["sha256"] == hashlib.sha256(x).hexdigest(), name
    for certificate in (imported, exported):
        logits = certificate["logits"]
        assert logits["finite"] and logits["perplexity"] > 1
        if importlib.util.find_spec("torch"):
            assert logits["torch"]["max_abs_error"] <= 1e-5 * logits["largest"]
            assert logits["torch"]["top1_agreement"] == 1
    card = (export / "README.md").read_text()
    _check_card(export / "README.md")
    for part in (
        "# model, patched",
        "| before | ",
        "| after | ",
        "| top rates | a 0.2 (SE), b 0.2 (OSM)",
        "certifies no safety",
        "| prompts | the tokenizer's chat template |",
        finished.state.context.data_hashes["harmful"],
        "`certificate.json` has the SHA-256 of every tensor",
    ):
        assert part in card, part
    assert str(finished.workdir) not in card and "were not written as" not in card


def _check_card(path):
    """The Hub's own reader finds the results of the run in the front matter."""
    front = pytest.importorskip("huggingface_hub").ModelCard.load(path).data.to_dict()
    assert front["library_name"] == "transformers" and "license" not in front
    results = pytest.importorskip("huggingface_hub").ModelCard.load(path).data.eval_results
    kinds = [result.metric_type for result in results]
    assert kinds == ["harm", "over_refusal", "perplexity"]
    assert "Its licence is not known here" in path.read_text()


def test_the_patch_file_turns_the_backbone_into_the_export_and_back(finished, tmp_path):
    backbone, export = finished.state.backbone, finished.state.folder("export")
    patch = finished.state.patch_file
    patched = patch_apply.apply(patch, backbone, tmp_path / "patched").folder
    assert weights(patched) == weights(export) != weights(backbone)
    reverted = patch_apply.revert(patch, patched, tmp_path / "back").folder
    assert weights(reverted) == weights(backbone)
    file = PatchFile(patch)
    assert file.entries() == finished.runner.result("patch")["total"]["survived"]
    assert file.about["settings"]["patch"]["beta"] == 1.0
    assert file.about["data"] == finished.state.context.data_hashes


def test_exported_model_differs_in_the_kept_entries_alone(finished):
    backbone, export = finished.state.backbone, finished.state.folder("export")
    before, after = (load_file(folder / "model.safetensors") for folder in (backbone, export))
    assert set(before) == set(after)
    entries = 0
    for name, x in before.items():
        if x.tobytes() != after[name].tobytes():
            assert "_proj.weight" in name
            entries += (x != after[name]).sum()
    total = finished.runner.result("patch")["total"]
    assert 0 < entries == total["survived"] <= total["kept"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (export / name).read_bytes() == (backbone / name).read_bytes()


def test_derived_models_are_deleted_after_success(finished, kept):
    for name in SCRATCH:
        assert [p.name for p in finished.runner.folder(name).iterdir()] == ["manifest.json"]
        assert len(list(kept.runner.folder(name).iterdir())) > 1
    assert model_hash(finished) == model_hash(kept)


def test_a_second_run_reuses_every_stage_also_elsewhere(finished, settings, tmp_path, capsys):
    again = Job(settings, copy_of(finished, tmp_path))
    again.run()
    out = capsys.readouterr().out
    assert not stages_run(out) and out.count("reused, inputs unchanged") == 13
    assert model_hash(again) == model_hash(finished)


def test_records_are_read_once(settings, tmp_path):
    """By what lays out the stages, and by what runs them."""
    roles = []

    def read(role, *places):
        roles.append(role)
        return load_records(role, *places)

    job = Job(settings, tmp_path / "work", read=read)
    assert job.plan() and job.state.context.data_hashes == job.state.inputs.data_hashes
    assert roles == ["harmful", "lookalike", "ordinary"]


def test_asking_for_another_certificate_trains_nothing_again(settings, finished, tmp_path, capsys):
    hashes = settings.override({"run.certify": "hashes"})
    Job(hashes, copy_of(finished, tmp_path)).run()
    ran = stages_run(capsys.readouterr().out)
    assert ran == ["certify_import", "certify_export", "report"]


def test_damaged_output_is_made_again(kept, finished, tmp_path, capsys):
    job = Job(kept.settings, copy_of(kept, tmp_path))
    model = job.state.folder("export") / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    job.run()
    out = capsys.readouterr().out
    assert "export: outputs are missing or have another size" in out
    assert stages_run(out) == ["export"] and model_hash(job) == model_hash(finished)
    # The patch stage's files are the exported ones.
    cases = ((model, ["patch", "export"]), (job.state.patch_file, ["patch_file"]))
    for path, stages in cases:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        job.run()
        out = capsys.readouterr().out
        assert f"{stages[-1]}: {path.relative_to(job.runner.folder(stages[-1]))} has other" in out
        assert "bytes than its manifest says (SHA-256)" in out
        assert stages_run(out) == stages and model_hash(job) == model_hash(finished)


def test_with_half_the_devices_the_selection_and_the_merge_are_the_same(kept, tmp_path, capsys):
    """Neither the mesh nor what is kept belongs to the workdir."""
    work = copy_of(kept, tmp_path)
    for name in ("patch", "export", "report"):
        shutil.rmtree(work / "stages" / name)
    with machine_of(4):
        fewer = Job(kept.settings.override({"mesh.shape": "fsdp:4"}), work)
        fewer.run()
    out = capsys.readouterr().out
    assert "Devices: 4 x cpu" in out and stages_run(out) == ["patch", "export", "report"]
    export = kept.state.folder("export")
    assert weights(fewer.state.folder("export")) == weights(export)
    assert fewer.runner.result("patch") == kept.runner.result("patch")


def test_update_runs_again_only_what_changed(finished, settings, tmp_path, capsys):
    work, beta = copy_of(finished, tmp_path), settings.override({"patch.beta": 2.0})
    with pytest.raises(
        ValueError, match=r"made by other settings: patch.beta: 1.0 -> 2.0.*--update"
    ):
        Job(beta, work)
    Job(settings.override({"evaluate.max_new_tokens": 5}), work, update=True).run()
    out = capsys.readouterr().out
    assert "export: reused" in out and "evaluate_backbone" in stages_run(out)
    # Scratch was deleted, and SE alone must be measured again.
    assert "derive_se" in stages_run(out)


def test_folder_of_the_user_is_not_taken_over(settings, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a run"):
        Job(settings, tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_layers_in_different_dtypes_are_refused_before_training(settings, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    changed = settings.override(
        {
            "model.source": str(model),
            "run.cache_dir": str(tmp_path / "cache"),
            "run.certify": "hashes",
        }
    )
    message = r"the layers of model.layers.\{layer\}.mlp.up_proj.weight are stored in different"
    with pytest.raises(ValueError, match=message):
        Job(changed, tmp_path / "work").run()


def test_failed_run_says_where_the_derived_models_lie(settings, tmp_path, capsys):
    diverging = settings.override({"derive.osm_learning_rate": 1e30})
    with pytest.raises(
        ValueError, match="derive OSM: answer NLL .* at step 2. Lower the learning rate"
    ):
        Job(diverging, tmp_path / "work").run()
    assert "The run did not finish" in capsys.readouterr().out
    assert (tmp_path / "work" / "stages" / "derive_se" / "params").is_dir()


def test_a_patch_that_keeps_nothing_is_refused(kept, tmp_path):
    nothing = kept.settings.override({"patch.top_rate_se": 0.0, "patch.top_rate_osm": 0.0})
    with pytest.raises(ValueError, match="No entry is kept"):
        Job(nothing, copy_of(kept, tmp_path), update=True).run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.source": ""}, "No model given"),
        ({"model.source": "/nowhere/model"}, "No model folder '/nowhere/model'"),
        ({"model.source": "nowhere.gguf"}, "No model file '.*nowhere.gguf'"),
        ({"data.harmful": "nowhere.csv"}, "No harmful data file 'nowhere.csv'"),
        ({"mesh.shape": "fsdp:16"}, "needs 16 devices, but there are 8"),
        ({"data.max_prompt_tokens": 8}, "prompts are longer than data.max_prompt_tokens = 8"),
    ],
)
def test_mistakes(change, message, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        Job(settings.override(change), tmp_path / "work").run()
