"""launch.continual as a user calls it: a chain of one link that is killed and resumed, each command
once, and mistakes."""

import functools

import pytest
from safetensors.numpy import load_file

from safepatch_jax.runtime.files import read_json
from safepatch_jax.testing import write_tiny_model
from tests import calls
from tests.jobs import write_table
from tests.launch.test_processes import launch

call = functools.partial(calls.call, "launch.continual")
done = functools.partial(calls.done, "launch.continual")


def tensors(folder):
    return {name: x.tobytes() for name, x in load_file(folder / "model.safetensors").items()}


def test_a_chain_killed_resumed_and_every_command(tmp_path):
    model = write_tiny_model(tmp_path / "model", num_key_value_heads=4, intermediate_size=32)
    splits = ("train",) * 4 + ("search",) + ("report",) * 2
    rows = [f"prompt {i},the answer {i},fraud,{split}" for i, split in enumerate(splits)]
    path = write_table(tmp_path / "data.csv", rows, "prompt,answer,category,split")
    work = f"--workdir={tmp_path / 'work'}"
    export = tmp_path / "work" / "links" / "01-fraud" / "stages" / "export" / "model"
    args = (
        "run",
        work,
        "--links=fraud",
        f"--model.source={model}",
        f"--data=harmful:{path},lookalike:{path},ordinary:{path}",
        f"--run.cache_dir={tmp_path / 'cache'}",
        "--derive.batch_size=4",
        "--derive.se_steps=2",
        "--derive.osm_steps=2",
        "--score.samples=2",
        "--run.certify=hashes",
        "--derive.se_learning_rate=1e-3",
        "--derive.osm_learning_rate=1e-3",
        "--evaluate.max_new_tokens=3",
        "--patch.combine=intersection",
    )
    calls.call_and_kill("patch: running", "launch.continual", *args)
    out = done(*args)
    assert "derive_se: running" not in out and "score_osm: running" not in out
    assert "Head:   01-fraud" in out
    starts = read_json(export.parents[2] / "environment.json")["starts"]
    assert "python -m launch.continual run --workdir=" in starts[-1]["command"]
    assert "| 01-fraud |" in (tmp_path / "work" / "continual.md").read_text()
    assert "fraud: on 0" in done("log", work)
    assert "statistics: " in done("show", "1", work)
    assert "00-start and 01-fraud differ in" in done("diff", "0", "1", work)
    assert "01-fraud: patch of" in done("verify", work)
    done("replay", work, "--to=1", f"--model={model}", f"--out={tmp_path / 'new'}")
    assert tensors(tmp_path / "new") == tensors(export) != tensors(model)
    assert f"The head is 00-start: {model}" in done("revert", work, "--last=1")
    assert "Link 1 cannot be removed" in call("remove", "1", work).stderr
    again = call("revert", work, "--last=1")
    assert again.returncode == 2 and "the chain has 0 links that can be taken off" in again.stderr


def test_processes_with_different_settings_are_refused(tmp_path):
    """Before they compute together: else one waits for tokens that the other does not make, and
    both are aborted."""
    model = write_tiny_model(tmp_path / "model")
    run = launch(
        tmp_path / "run",
        "launch.continual",
        "run",
        f"--workdir={tmp_path / 'work'}",
        "--links=privacy",
        f"--model.source={model}",
        f"--run.cache_dir={tmp_path / 'cache'}",
        own=("--evaluate.max_new_tokens=3", "--evaluate.max_new_tokens=4"),
    )
    assert run.finish() == [2, 2], run.texts()
    (_, error), (quiet, other) = run.texts()
    assert (
        "error: The processes differ: evaluate.max_new_tokens is 3 in process 0, 4 in process 1."
        in error
    )
    assert quiet == other == "" and not (tmp_path / "work").exists()


def test_help_is_a_manual():
    text = call("--help").stdout
    assert "python -m launch.continual revert --workdir=runs/chain --last=K" in text
    assert "--methods\n" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (
            [],
            "one command is needed, none was given. There are run, log, show, diff, replay, "
            "revert, remove, verify",
        ),
        (["run"], "run needs --links"),
        (
            ["revert", "--last=1", "--patch.beta=2", "--noalign.enabled", "--config=x.py"],
            "revert does not take --config, --align.enabled, --patch.beta.",
        ),
        (["diff", "1"], "diff takes 2 numbers after it, got '1'"),
        (["log"], "There is no patch log"),
        (["log", "--keep_models=1"], "log does not take --keep_models"),
        (["run", "--links=a", "--methods=dpo"], "--methods: there is no dpo"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message, tmp_path):
    result = call(*args, f"--workdir={tmp_path / 'work'}")
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
