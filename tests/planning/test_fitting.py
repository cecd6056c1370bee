"""derive.memory=auto: what it chooses for devices, and that a workdir keeps it."""

import dataclasses
import pathlib

import pytest

from safepatch_jax.models.config import read_hf_config
from safepatch_jax.planning.chips import present
from safepatch_jax.planning.compile import measure
from safepatch_jax.planning.fitting import HOST_SHARE, at_hand, fitted, less_disk
from safepatch_jax.planning.plan import dry_run
from safepatch_jax.planning.programs import holdings, programs
from safepatch_jax.planning.search import Planner
from safepatch_jax.run.job import SETTINGS
from safepatch_jax.run.room import disk_bytes
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of
from tests.hub import use
from tests.jobs import machine_of


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Settings whose train step takes by far most."""
    folder = tmp_path_factory.mktemp("fitting")
    source = write_tiny_model(
        folder / "model", num_hidden_layers=12, hidden_size=64, intermediate_size=256
    )
    return Settings().override(
        {
            "model.source": str(source),
            "model.remat": "full",
            "data.max_prompt_tokens": 8,
            "data.max_answer_tokens": 8,
            "derive.memory": "auto",
            "derive.batch_size": 1,
            "score.samples": 2,
            "evaluate.batch_size": 1,
            "evaluate.max_new_tokens": 2,
        }
    )


def target_of(memory):
    return dataclasses.replace(present(sharder_of(1)), memory=memory)


def needed(settings, kind="train"):
    """Return the bytes that the programs of a kind take."""
    planner = Planner(read_hf_config(settings.model.source), target_of(None))
    return max(f.required for f in planner.measure(settings, kind))


def test_settings_that_fit_stay_and_others_are_replaced_by_the_nearest(given, tmp_path, capsys):
    whole = needed(given)
    assert fitted(given, tmp_path, target=target_of(whole)) == given
    assert "settings as given; train takes most" in capsys.readouterr().out
    chosen = fitted(given, tmp_path, target=target_of(whole - 1))
    layerwise = {"derive.train": "scope", "derive.backward": "layerwise"}
    assert chosen == given.override(layerwise)
    lean = fitted(given, tmp_path, target=target_of(needed(chosen) - 1))
    assert lean == given.override(layerwise | {"derive.optimizer": "adafactor"})
    assert needed(lean) < needed(chosen) < whole
    out = capsys.readouterr().out
    assert "--derive.train=scope --derive.backward=layerwise --derive.optimizer=adafactor" in out
    with pytest.raises(ValueError, match="nothing that leaves the mesh.*--dry_run"):
        fitted(given, tmp_path, target=target_of(needed(lean) // 4))


def test_a_workdir_keeps_what_it_was_begun_with(given, tmp_path, capsys):
    chosen = given.override({"derive.train": "scope", "derive.backward": "layerwise"})
    files.write_json(tmp_path / SETTINGS, chosen.to_dict())
    large = target_of(2**40)
    assert fitted(given, tmp_path, target=large) == chosen
    assert "as this workdir was begun (--update chooses again)" in capsys.readouterr().out
    assert fitted(given, tmp_path, afresh=True, target=large) == given
    plain = given.override({"derive.memory": "given"})
    assert fitted(plain, tmp_path, target=target_of(1)) == plain
    # What a disk had no room for stays too, though it is no part of the outcome.
    short = chosen.override({"run.checkpoint_minutes": 0.0, "derive.store": "bfloat16"})
    files.write_json(tmp_path / SETTINGS, short.to_dict())
    assert fitted(given, tmp_path, target=large) == short
    again = fitted(given, tmp_path, afresh=True, target=large)
    assert again == given.override({"run.checkpoint_minutes": 0.0})  # all weights are trained
    # A workdir that was begun without it is no choice.
    files.write_json(tmp_path / SETTINGS, chosen.override({"derive.memory": "given"}).to_dict())
    assert fitted(given, tmp_path, target=large) == given


def test_a_plan_of_an_absent_model_of_the_hub_needs_no_network(
    given, tmp_path, monkeypatch, capsys
):
    use(monkeypatch, tmp_path, offline=True)
    stand_in = f"{given.model.source}/config.json"
    absent = {"model.source": "org/absent", "model.architecture": stand_in}
    absent["export.dtype"] = "bfloat16"
    with machine_of(1):
        dry_run(given.override(absent), tmp_path / "work")
    out = capsys.readouterr().out
    assert "Memory:  settings as given" in out and "'org/absent' is not at hand" in out
    assert "Warning: the result is stored as bfloat16, rounded to nearest" in out
    assert "Memory of score:" in out and not (tmp_path / "work").exists()


def test_cpus_share_what_the_host_has_free():
    one, eight = (at_hand(present(sharder_of(n))).memory for n in (1, 8))
    assert 2**28 < one < 2**50 and eight == pytest.approx(one / 8, rel=0.2)


MACHINE = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 100 kB\n"}
NEW, OLD = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
CONTAINERS = {
    "no limit": ({"proc/self/cgroup": "0::/\n", NEW + "memory.max": "max\n"}, 102_400),
    "in a container": (
        {
            "proc/self/cgroup": "0::/\n",
            NEW + "memory.max": "60000\n",
            NEW + "memory.current": "50000\n",
            NEW + "memory.stat": "anon 20000\ninactive_file 30000\n",
        },
        40_000,
    ),
    "a group above": (
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            NEW + "jobs/memory.max": "60000\n",
            NEW + "jobs/memory.current": "10000\n",
            NEW + "jobs/mine/memory.max": "90000\n",
            NEW + "jobs/mine/memory.current": "10000\n",
        },
        50_000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "3:cpu:/\n2:memory:/docker/of-the-host\n0::/\n",
            OLD + "memory.limit_in_bytes": "60000\n",
            OLD + "memory.usage_in_bytes": "50000\n",
            OLD + "memory.stat": "inactive_file 7\ntotal_inactive_file 30000\n",
        },
        40_000,
    ),
}


@pytest.mark.parametrize("texts, free", CONTAINERS.values(), ids=CONTAINERS)
def test_cpus_stay_within_the_limit_of_a_container(tmp_path, monkeypatch, texts, free):
    for name, text in (MACHINE | texts).items():
        files.write_text(tmp_path / name, text)
    read = pathlib.Path.read_text

    def below(path, *args, **options):
        if path.parts[1] in ("proc", "sys"):
            path = tmp_path / path.relative_to("/")
        return read(path, *args, **options)

    target = present(sharder_of(1))
    monkeypatch.setattr(pathlib.Path, "read_text", below)
    assert at_hand(target).memory == int(HOST_SHARE * free)


def test_purposes_add_up_to_what_the_programs_hold(given):
    """Of the layerwise passes on 8 devices: arguments and what is resident beside them."""
    sharder = sharder_of(8, tensor=2)
    settings = given.override(
        {
            "derive.train": "scope",
            "derive.backward": "layerwise",
            "derive.optimizer": "adafactor",
            "derive.batch_size": 8,
        }
    )
    config = read_hf_config(settings.model.source)
    holds = holdings(settings, config, sharder)
    for kind in ("train", "score"):
        parts = programs(settings, config, sharder, [kind])
        measured = [measure(part, present(sharder), sharder) for part in parts]
        most = max(f.arguments + f.resident for f in measured)
        assert most == pytest.approx(sum(holds[kind].values()), rel=0.1), holds[kind]


def test_a_short_disk_takes_what_is_kept_away_in_order(given):
    config = read_hf_config(given.model.source)
    scope = given.override({"derive.train": "scope", "run.checkpoint_minutes": 10.0})
    steps = [{"run.checkpoint_minutes": 0.0}, {"derive.store": "bfloat16"}]
    steps.append({"score.store": "bfloat16"})
    expected: dict = {}
    for more in ({}, *steps):
        expected = expected | more
        room = disk_bytes(scope.override(expected), config).most
        assert less_disk(scope, config, room) == expected
    assert less_disk(scope, config, 0) == expected and less_disk(scope, config, None) == {}
    # All weights are trained: their differences cannot be kept.
    assert less_disk(given, config, 0).keys() == {"run.checkpoint_minutes", "score.store"}
