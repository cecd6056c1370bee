"""launch.durability as a user calls it: killed, resumed, refused."""

import numpy as np
import pytest

from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.runtime.files import read_json
from tests.calls import call, call_and_kill, done

LAUNCHER = "launch.durability"


@pytest.fixture(scope="module")
def given(flags, sharder, tmp_path_factory):
    """The flags of a base and a patched model."""
    base = flags[0].partition("=")[2]
    config, params = load_params(base, sharder)
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"] * np.float32(1.1)
    model = tmp_path_factory.mktemp("patched") / "model"
    save_model(model, params, config, base)
    data = [flag for flag in flags if flag.startswith(("--data=", "--run."))]
    return [f"--base={base}", f"--model={model}", "--treatments=int8,finetune", *data]


def test_a_killed_study_is_resumed(given, tmp_path):
    work = tmp_path / "work"
    command = LAUNCHER, f"--workdir={work}", "--finetune.steps=2", *given
    call_and_kill("[3/3] finetune", *command)
    assert (
        list((work / "measured").glob("int8.entries.*")) and not (work / "durability.md").exists()
    )
    said = done(*command)
    assert "[2/3] int8: measured already" in said and "[3/3] finetune\n" in said
    assert f"Report: {work / 'durability.md'}" in said and "int8 leaves: " in said
    content = read_json(work / "durability.json")
    assert [x["name"] for x in content["treatments"]] == ["int8", "finetune"]
    assert content["treatments"][1]["title"].startswith("2 steps")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--workdir=w"], "--base is needed"),
        (["--base=gone", "--workdir=w", "--treatments=int2"], "'int2' is none"),
        (["--base=gone", "--model=gone", "--workdir=w"], "gone"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message):
    result = call(LAUNCHER, *args)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
