"""The lm-evaluation-harness adapter beside the harness's own `hf` model, on a tiny random model;
skips without the harness."""

import inspect
import json
import os
import random
import subprocess
import sys

import pytest

from launch import lm_eval as launcher

MODULE = "safepatch_jax.evaluation.lm_eval_model"


def test_without_the_harness_the_error_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lm_eval\[math\]'"):
        __import__(MODULE)
    with pytest.raises(SystemExit) as end:
        launcher.run()
    assert end.value.code == 2 and "pip install 'lm_eval[" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_manual_needs_no_harness(monkeypatch, capsys, word):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(sys, "argv", ["safepatch lm-eval", word])
    launcher.run()
    shown = capsys.readouterr().out
    assert "--tasks mmlu,hellaswag,ai2_arc,winogrande,bbh,gsm8k,minerva_math" in shown
    assert "compute_dtype=bfloat16" in shown and "pip install 'lm_eval[math]'" in shown


def test_the_manual_has_all_model_arguments(adapter):
    for name in inspect.signature(adapter.SafePatchLM).parameters:
        assert name in launcher.__doc__, name


@pytest.fixture(scope="module")
def adapter():
    pytest.importorskip("lm_eval")
    from safepatch_jax.evaluation import lm_eval_model

    return lm_eval_model


@pytest.fixture(scope="module")
def ours(adapter, tiny):
    return adapter.SafePatchLM.create_from_arg_obj(
        {"pretrained": str(tiny), "mesh": "data:1,fsdp:8,tensor:1", "batch_size": 8},
        {"batch_size": 1, "device": "cuda:0"},
    )


@pytest.fixture(scope="module")
def theirs(ours, tiny):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    return huggingface.HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=8)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_the_harness_keeps_its_own_model_types(adapter):
    from lm_eval.api.registry import get_model, model_registry

    assert get_model("safepatch_jax") is adapter.SafePatchLM and {"hf", "dummy"} <= set(
        model_registry.keys()
    )


def texts(count, longest, seed=0):
    draw = random.Random(seed)
    lengths = (draw.randint(3, longest) for _ in range(count))
    return ["".join(draw.choices("abc de.\nÄ", k=length)) + "." for length in lengths]


def test_likelihoods_equal_those_of_hf(ours, theirs):
    pairs = [
        *zip(texts(20, 90), [f" {text}" for text in texts(20, 6, seed=1)]),
        ("", "no context"),
        ("ends in spaces  ", "then"),
        ("too long " * 80, " it is"),
    ]
    got, expected = (
        model.loglikelihood(instances("loglikelihood", *pairs)) for model in (ours, theirs)
    )
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in got] == pytest.approx(
        [logprob for logprob, _ in expected], abs=1e-4
    )


def test_rolling_likelihoods_equal_those_of_hf(ours, theirs):
    whole = [(text,) for text in (*texts(4, 60), "long " * 250)]
    got, expected = (
        model.loglikelihood_rolling(instances("loglikelihood_rolling", *whole))
        for model in (ours, theirs)
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_answers_equal_those_of_hf(ours, theirs):
    arguments = [
        {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        {"until": [], "max_new_tokens": 9, "temperature": 0.0},
    ]
    asked = [(text, arguments[i % 2]) for i, text in enumerate([*texts(8, 40), "too long " * 80])]
    got, expected = (
        model.generate_until(instances("generate_until", *asked)) for model in (ours, theirs)
    )
    assert got == expected and any(got)


def test_long_answers_end_with_their_stop_texts(ours, theirs):
    """A batch ends with the piece in which the last of its stop texts comes; the texts are those of
    `hf`, which stops at once."""
    contexts = texts(6, 40, seed=2)
    free = ours.generate_until(
        instances("generate_until", *[(text, {"max_gen_toks": 30}) for text in contexts])
    )
    until = sorted({text[2:4] for text in free if len(text) > 4})
    asked = [(text, {"until": until, "max_gen_toks": 160, "do_sample": False}) for text in contexts]
    got, expected = (
        model.generate_until(instances("generate_until", *asked)) for model in (ours, theirs)
    )
    assert got == expected and any(got) and until


def test_conversations_equal_those_of_hf(ours, theirs):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert ours.apply_chat_template(talk[:1]) == theirs.apply_chat_template(talk[:1])
    assert ours.apply_chat_template(talk, False) == theirs.apply_chat_template(talk, False)
    assert (
        ours.chat_template(True) == theirs.chat_template(True)
        and ours.tokenizer_name == theirs.tokenizer_name
    )


def test_samples_differ_and_repeat(ours):
    asked = instances(
        "generate_until",
        *[("Hello", {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 8})] * 4,
    )
    first = ours.generate_until(asked)
    assert len(set(first)) == 4 and ours.generate_until(asked) == first


@pytest.mark.parametrize(
    "given, max_new, temperature",
    [
        ({}, 256, 0.0),
        ({"max_tokens": 5, "max_gen_toks": 7}, 7, 0.0),
        ({"temperature": 0.7}, 256, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 256, 0.0),
        ({"do_sample": True}, 256, 1.0),
    ],
)
def test_generation_arguments(adapter, given, max_new, temperature):
    until, length, sampling = adapter.generation_arguments({"until": "\n"} | given)
    assert (until, length, sampling.temperature) == (["\n"], max_new, temperature)


def test_unknown_generation_arguments_are_named(adapter):
    with pytest.raises(ValueError, match="num_beams: not known"):
        adapter.generation_arguments({"until": ["."], "num_beams": 4})


@pytest.mark.parametrize(
    "given, message",
    [
        ("pretrained=MODEL,batch_size=auto", "whole number"),
        ("pretrained=MODEL,device=cuda", "Got pretrained, device"),
        ("mesh=fsdp:-1", "first one is needed"),
        ("pretrained=nowhere", "nowhere"),
    ],
)
def test_wrong_arguments(adapter, tiny, given, message):
    with pytest.raises(ValueError, match=message):
        adapter.SafePatchLM.create_from_arg_string(
            given.replace("MODEL", str(tiny)), {"device": "cuda:0"}
        )


def test_the_launcher_measures_a_local_task(adapter, tiny, tmp_path):
    pytest.importorskip("datasets")
    rows = [{"question": f"Is {i} even?", "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_even.yaml").write_text(
        "task: local_even\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'rows.jsonl'}\ndoc_to_text: "
        f"'{{{{question}}}}'\ndoc_to_target: answer\n"
        "doc_to_choice: ['yes', 'no']\nmetric_list:\n  - metric: acc\n"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.lm_eval",
            "--model",
            "safepatch_jax",
            "--model_args",
            f"pretrained={tiny},batch_size=4",
            "--include_path",
            str(tmp_path),
            "--tasks",
            "local_even",
            "--apply_chat_template",
            "--output_path",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    [written] = (tmp_path / "out").rglob("results_*.json")
    assert (
        0 <= json.loads(written.read_text())["results"]["local_even"]["acc,none"] <= 1
        and "local_even" in result.stdout
    )
