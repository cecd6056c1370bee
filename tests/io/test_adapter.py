"""LoRA adapters: merged into their base with PEFT's arithmetic; other adapters are refused."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.adapter import merge_adapter
from safepatch_jax.testing import write_tiny_model
from tests.calls import call

RANK, ALPHA = 4, 6.0
TARGETS = ("self_attn.q_proj", "mlp.down_proj")


def write_adapter(folder, base, dtype=np.float32, **settings):
    """Write an adapter as PEFT does; return its factors by the weight's name."""
    folder.mkdir()
    rng, factors, tensors = np.random.default_rng(0), {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith(TARGETS):
            a = rng.normal(size=(RANK, weight.shape[1])).astype(dtype)
            b = rng.normal(size=(weight.shape[0], RANK)).astype(dtype)
            factors[name] = a, b
            tensors[f"base_model.model.{stem}.lora_A.weight"] = a
            tensors[f"base_model.model.{stem}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    return factors


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_base_plus_scaled_product(tmp_path, rslora):
    base = write_tiny_model(tmp_path / "base")
    factors = write_adapter(tmp_path / "lora", base, use_rslora=rslora)
    out = tmp_path / "out"
    out.mkdir()
    assert merge_adapter(base, tmp_path / "lora", out) == len(factors) == 4
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    scaling = ALPHA / RANK**0.5 if rslora else ALPHA / RANK
    for name, weight in before.items():
        if name not in factors:
            np.testing.assert_array_equal(after[name], weight)
            continue
        a, b = (x.astype(np.float64) for x in factors[name])
        np.testing.assert_allclose(after[name], weight + scaling * (b @ a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_weights_are_those_of_peft(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="the reference is PEFT: pip install torch peft")
    peft = pytest.importorskip("peft", reason="the reference is PEFT: pip install peft")
    from transformers import AutoModelForCausalLM

    base = write_tiny_model(tmp_path / "base")
    factors = write_adapter(
        tmp_path / "lora",
        base,
        dtype,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
    )
    (tmp_path / "out").mkdir()
    merge_adapter(base, tmp_path / "lora", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    theirs = wrapped.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name in factors:
        np.testing.assert_allclose(ours[name], theirs[name].numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"use_dora": True}, "not plain LoRA: use_dora = True"),
        ({"peft_type": "IA3"}, "not plain LoRA: peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1]"),
        ({"use_what_comes_next": True}, "use_what_comes_next = True"),
        ({"r": 0}, "r = 0"),
    ],
)
def test_other_adapters_are_refused(tmp_path, settings, part):
    base = write_tiny_model(tmp_path / "base")
    write_adapter(tmp_path / "lora", base, **settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="adapter_config.json") as raised:
        merge_adapter(base, tmp_path / "lora", tmp_path / "out")
    assert part in str(raised.value) and not list((tmp_path / "out").iterdir())


def test_what_newer_versions_write_beside_plain_lora_is_read(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    off = {"arrow_config": None, "use_bdlora": False, "rank_pattern": {}, "qalora_group_size": 16}
    targets = {"target_modules": ["q_proj"], "init_lora_weights": True, "peft_version": "0.19.0"}
    write_adapter(tmp_path / "lora", base, **off, **targets)
    (tmp_path / "out").mkdir()
    assert merge_adapter(base, tmp_path / "lora", tmp_path / "out") == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda name, x: None, "holds no tensors: nothing was trained"),
        (lambda name, x: x * ("lora_A" in name), "changes no weight of"),
        (lambda name, x: x[:0], "8 of 8 tensors are empty .*ZeRO-3"),
        (lambda name, x: x[0], "not plain LoRA: base_model"),
    ],
)
def test_adapters_that_add_nothing_are_refused(tmp_path, change, message):
    base, file = (
        write_tiny_model(tmp_path / "base"),
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    write_adapter(tmp_path / "lora", base)
    changed = {name: change(name, x) for name, x in load_file(file).items()}
    save_file({name: x.copy() for name, x in changed.items() if x is not None}, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        merge_adapter(base, tmp_path / "lora", tmp_path / "out")


def test_a_quantised_base_is_refused(tmp_path):
    base, file = write_tiny_model(tmp_path / "base"), tmp_path / "base" / "model.safetensors"
    write_adapter(tmp_path / "lora", base)
    tensors = load_file(file)
    (tmp_path / "out").mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype, message in [
        (ml_dtypes.float8_e4m3fn, r"weights are quantised \(FP8 or less"),
        (np.int64, "has dtype I64, supported are float32"),
    ]:
        save_file(tensors | {name: tensors[name].astype(dtype)}, file)
        with pytest.raises(ValueError, match=message):
            merge_adapter(base, tmp_path / "lora", tmp_path / "out")


def test_an_adapters_tokenizer_goes_with_the_model(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    (tmp_path / "lora" / "chat_template.jinja").write_text("{{ 'mine' }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ 'the base' }}")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="holds chat_template.jinja and no vocabulary"):
        merge_adapter(base, tmp_path / "lora", tmp_path / "out")
    shutil.copy(base / "tokenizer.json", tmp_path / "lora")
    merge_adapter(base, tmp_path / "lora", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    others = ("tokenizer_config.json", "additional_chat_templates")
    assert not any((tmp_path / "out" / name).exists() for name in others)


def test_adapters_of_older_versions(tmp_path):
    torch = pytest.importorskip("torch", reason="older adapters are torch files: pip install torch")
    base = write_tiny_model(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    merge_adapter(base, tmp_path / "lora", tmp_path / "new")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = {name: torch.tensor(x) for name, x in load_file(file).items()}
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    file.unlink()
    merge_adapter(base, tmp_path / "lora", tmp_path / "old")
    new, old = (tmp_path / name / "model.safetensors" for name in ("new", "old"))
    assert new.read_bytes() == old.read_bytes()


def test_another_base_is_refused(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    other = write_tiny_model(tmp_path / "other", intermediate_size=48)
    fewer = write_tiny_model(tmp_path / "fewer", num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(other, tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ValueError, match="changes tensors that .* lacks: model.layers.1"):
        merge_adapter(fewer, tmp_path / "lora", tmp_path / "out")


def test_convert_merges(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    args = [f"--source=hf:{base}", f"--adapter={tmp_path / 'lora'}", "--certify=hashes"]
    result = call("launch.convert", *args, f"--target=hf:{tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "into 4 tensors" in result.stdout
    (tmp_path / "direct").mkdir()
    merge_adapter(base, tmp_path / "lora", tmp_path / "direct")
    ours, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "direct"))
    for name, weight in direct.items():
        np.testing.assert_array_equal(ours[name], weight)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert len(certificate["changed"]) == 4 and "20 tensors matched, 4 changed" in result.stdout
    digest = hashlib.sha256((tmp_path / "lora/adapter_model.safetensors").read_bytes()).hexdigest()
    assert certificate["adapter"]["adapter_model.safetensors"] == digest
