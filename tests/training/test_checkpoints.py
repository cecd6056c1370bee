"""Checkpoints within training: a run that was stopped anywhere resumes with the same bits; damage
is found; SIGTERM; full disk."""

import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.runtime import stopping
from safepatch_jax.training.checkpoints import Checkpoints, checksums
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.step import Saving
from tests.training.test_step import make

RECIPE = Recipe(1.0, 6, 1e-3)
ALWAYS = 1e-9  # minutes


class Cut(Exception):
    pass


def cut_after(step):
    """A `record` that ends the run, as a kill would, when a step has been read."""

    def record(done, values):
        if done == step:
            raise Cut

    return record


def run(tiny, saving=None, devices=1, recipe=RECIPE, **options):
    trainer, _, params, examples = make(tiny, devices)
    return trainer.run(
        params, training_batches([(examples[:5], 4)], 3), recipe, "run", saving, **options
    )


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return run(tiny)


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_run_that_was_cut_resumes_with_the_same_bits(tiny, undisturbed, tmp_path, capsys, step):
    saving = Saving(tmp_path / "steps", ALWAYS)
    with pytest.raises(Cut):
        run(tiny, saving, record=cut_after(step))
    steps = []
    tuned, outcome = run(tiny, saving, record=lambda done, values: steps.append(done))
    assert_same_bits(tuned, undisturbed[0])
    assert outcome == undisturbed[1]
    out = capsys.readouterr().out
    # What is written in the background is not what later steps make of it.
    assert "damaged" not in out
    if step > 2:  # before that nothing need have been written
        assert f"resumed after step {steps[0] - 1} of 6" in out
        assert steps == list(range(steps[0], 7)) and steps[0] > 1


def test_ascent_that_stopped_stays_stopped(tiny, tmp_path):
    free = run(tiny, recipe=Recipe(-1.0, 6, 2e-3))[1]
    recipe = Recipe(-1.0, 6, 2e-3, nll_ceiling=(free.nll[3] + free.nll[4]) / 2)
    expected = run(tiny, recipe=recipe)
    with pytest.raises(Cut):
        run(tiny, Saving(tmp_path / "steps", ALWAYS), recipe=recipe, record=cut_after(4))
    tuned, outcome = run(tiny, Saving(tmp_path / "steps", ALWAYS), recipe=recipe)
    assert_same_bits(tuned, expected[0])
    assert outcome == expected[1] and outcome.stopped_by.startswith("answer NLL above")


def test_a_checkpoint_is_restored_onto_another_mesh(tiny, undisturbed, tmp_path):
    with pytest.raises(Cut):
        run(tiny, Saving(tmp_path / "steps", ALWAYS), devices=8, record=cut_after(5))
    tuned, outcome = run(tiny, Saving(tmp_path / "steps", ALWAYS), devices=2)
    np.testing.assert_allclose(outcome.nll, undisturbed[1].nll, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(undisturbed[0])):
        assert np.mean(np.abs(np.asarray(x) - np.asarray(y)) > 1e-5) < 0.02


@pytest.fixture
def store(tmp_path):
    """Two checkpoints of a small state, and where they are."""
    state = {"a": jax.numpy.arange(5000.0), "b": (jax.numpy.zeros((), bool), jax.numpy.int32(7))}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    folder = tmp_path / "the steps, 100% #1"  # a path is no address
    with Checkpoints(folder, abstract) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state | {"a": state["a"] + step}, {"nll": [0.5] * step})
    return abstract, folder


def test_the_newest_checkpoint_is_taken(store):
    abstract, folder = store
    with Checkpoints(folder, abstract) as checkpoints:
        state, facts = checkpoints.restore()
    assert facts == {"nll": [0.5] * 4} and float(state["a"][10]) == 14.0


def newest_files(folder):
    return sorted(
        (p for p in (folder / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def damages(folder):
    """By name, ways in which the newest checkpoint may be damaged."""

    def truncate(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path, where):
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 4
        path.write_bytes(content)

    largest = newest_files(folder)[-1]
    return {
        "truncated arrays": lambda: truncate(largest),
        "one bit of the arrays": lambda: flip(largest, 0.5),
        "another bit": lambda: flip(largest, 0.25),
        "truncated facts": lambda: truncate(next((folder / "4" / "facts").iterdir())),
        "empty facts": lambda: next((folder / "4" / "facts").iterdir()).write_text("{}"),
        "no arrays": lambda: [
            p.unlink() for p in (folder / "4" / "state").rglob("*") if p.is_file()
        ],
        "lost arrays": lambda: largest.unlink(),
    }


@pytest.mark.parametrize(
    "damage",
    [
        "truncated arrays",
        "one bit of the arrays",
        "another bit",
        "truncated facts",
        "empty facts",
        "no arrays",
        "lost arrays",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(store, capsys, damage):
    abstract, folder = store
    damages(folder)[damage]()
    with Checkpoints(folder, abstract) as checkpoints:
        state, facts = checkpoints.restore()
    assert facts == {"nll": [0.5, 0.5]} and float(state["a"][0]) == 2 and int(state["b"][1]) == 7
    assert "The checkpoint of step 4 is damaged" in capsys.readouterr().out
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["2"]


def test_what_a_kill_left_half_written_is_no_checkpoint(store):
    abstract, folder = store
    (folder / "4").rename(folder / "4.orbax-checkpoint-tmp")
    with Checkpoints(folder, abstract) as checkpoints:
        assert len(checkpoints.restore()[1]["nll"]) == 2


def test_a_failed_write_is_reported_beside_another_error(store, capsys):
    abstract, folder = store
    state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Cut), Checkpoints(folder, abstract) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for the full disk
            checkpoints.save(6, state, {"nll": []})
            raise Cut
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Cannot write a checkpoint to" in capsys.readouterr().out
    with Checkpoints(folder, abstract) as checkpoints:
        assert len(checkpoints.restore()[1]["nll"]) == 4


def test_no_checkpoint_at_all(tmp_path):
    with Checkpoints(
        tmp_path / "steps",
        {"a": jax.ShapeDtypeStruct((2,), np.float32, sharding=jax.numpy.zeros(2).sharding)},
    ) as c:
        assert c.restore() is None


def test_every_bit_counts_in_a_checksum():
    x = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    before = checksums({"x": jax.numpy.asarray(x)})["x"]
    for i in range(0, 1200, 37):
        for bit in (0, 15, 31):
            changed = x.copy()
            changed.reshape(-1).view(np.uint32)[i] ^= np.uint32(1 << bit)
            assert checksums({"x": jax.numpy.asarray(changed)})["x"] != before, (i, bit)
    index = np.arange(1200, dtype=np.uint64)
    assert before == int(
        (x.reshape(-1).view(np.uint32).astype(np.uint64) * (2 * index + 1)).sum() % 2**32
    )


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_sigterm_in_training_writes_a_checkpoint_and_ends(
    tiny, undisturbed, tmp_path, capsys, monkeypatch, step
):
    monkeypatch.setattr(stopping._State, "requested", False)
    before = signal.signal(signal.SIGTERM, stopping.on_signal)
    try:

        def record(done, values):
            if done == step:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(SystemExit) as ended:
            run(tiny, Saving(tmp_path / "steps", 0.0), record=record)
    finally:
        signal.signal(signal.SIGTERM, before)
    stopping._State.requested = False
    out = capsys.readouterr().out
    (last,) = re.findall(r"ends after step (\d+)\. A checkpoint is written", out)
    # Known one step late, in all processes.
    assert ended.value.code == 143 and int(last) == min(6, step + 3)
    steps = []
    tuned, outcome = run(
        tiny, Saving(tmp_path / "steps", 0.0), record=lambda done, values: steps.append(done)
    )
    assert steps == list(range(int(last) + 1, 7)) and outcome == undisturbed[1]
    assert_same_bits(tuned, undisturbed[0])


def test_a_flipped_bit_in_any_file_gives_the_checkpoint_before_or_the_same_state(tmp_path):
    """Also below a folder whose name is a pattern."""
    state = {"a": jnp.arange(300.0), "b": {"c": jnp.ones((3, 4))}}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    folder = tmp_path / "run [2]*" / "steps"
    with Checkpoints(folder, abstract) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"step": step, "nll": [1.5] * step})
    paths = [path for path in sorted((folder / "2").rglob("*")) if path.is_file()]
    rng, restored = np.random.default_rng(0), []
    for number in range(25):
        copy = shutil.copytree(folder, tmp_path / "run [2]*" / str(number))
        path = copy / paths[number % len(paths)].relative_to(folder)
        data = bytearray(path.read_bytes())
        if data:
            place = int(rng.integers(8 * len(data)))
            data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with Checkpoints(copy, abstract) as checkpoints:
            found, facts = checkpoints.restore()
        assert facts == {"step": facts["step"], "nll": [1.5] * facts["step"]}
        assert_same_bits(found, state)
        restored.append(facts["step"])
    assert {1, 2} == set(restored)


def test_a_folder_of_checkpoints_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "steps").symlink_to("theirs")
    with pytest.raises(ValueError, match="steps is a link to theirs, whose content is neither"):
        Checkpoints(tmp_path / "steps", {})
