"""Figures of a run's programs on simulated devices, refusals, the search for settings, and the
report."""

import dataclasses
import functools
import json
import types

import jax
import pytest

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.planning import compile as compiling
from safepatch_jax.planning import report
from safepatch_jax.planning.chips import CHIPS, GIB, Target, present
from safepatch_jax.planning.compile import (
    Figures,
    least_times,
    link_seconds,
    measure,
    memory_needed,
    utilisation,
    whole_floor,
)
from safepatch_jax.planning.programs import (
    PROGRAMS,
    abstract_batch,
    architecture,
    device_bytes,
    in_blocks,
    lengths,
    programs,
    resident_bytes,
)
from safepatch_jax.planning.screen import screen_train
from safepatch_jax.planning.search import Planner, as_flags, ladder, step
from safepatch_jax.planning.work import Collective, ProgramWork
from safepatch_jax.settings import Settings
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of

CONFIG = config_from_hf(
    tiny_config(torch_dtype="bfloat16", num_attention_heads=4, num_key_value_heads=4)
)
SETTINGS = Settings().override(
    {
        "model.remat": "none",
        "data.max_prompt_tokens": 20,
        "data.max_answer_tokens": 6,
        "derive.batch_size": 8,
        "evaluate.batch_size": 8,
        "evaluate.max_new_tokens": 4,
    }
)
TITLES = [
    "train",
    "score forward",
    "score end",
    "score backward",
    "score put",
    "patch q k v",
    "patch o",
    "patch gate up",
    "patch down",
    "decode",
]


@pytest.fixture(scope="module")
def measured():
    sharder = sharder_of(8, tensor=2)
    target = dataclasses.replace(present(sharder), chip=CHIPS["v5e"], memory=CHIPS["v5e"].hbm)
    return {p.title: measure(p, target, sharder) for p in programs(SETTINGS, CONFIG, sharder)}


def test_the_compile_cache_stays_where_it_was():
    before = jax.config.jax_compilation_cache_dir
    programs(SETTINGS.override({"run.cache_dir": "/nowhere"}), CONFIG, sharder_of(8))
    assert jax.config.jax_compilation_cache_dir == before


def test_every_program_is_measured(measured):
    assert list(measured) == TITLES
    for title, f in measured.items():
        assert f.fits and f.peak >= f.arguments + f.resident and f.seconds > 0, title
        assert not f.work.unknown_loops, title
        assert (f.flops > 0) == (f.kind != "patch" and title != "score put")
        assert set(f.floor) == {"compute", "memory", "links"}
        json.dumps(f.to_dict())
        if f.kind == "patch":
            # Counts alone: on CPU some of them are gathered and added up
            # (tests/planning/test_tpu.py has no gather).
            assert set(f.work.by_kind()) <= {"all-reduce", "all-gather"}
            assert f.work.sent() < 2**16 and not f.work.sorts


def test_arguments_are_what_the_table_says(measured):
    sharder, table = sharder_of(8, tensor=2), param_table(CONFIG)
    params = device_bytes(table, sharder, "float32")
    close = functools.partial(pytest.approx, abs=4096)  # batches and scalars
    assert measured["train"].arguments == close(3 * params)
    assert measured["decode"].arguments == close(params)
    assert measured["train"].resident == 0
    for title, path in (("patch q k v", "layers/attention/q"), ("patch down", "layers/mlp/down")):
        # Of two models, with two sensitivities.
        weight = device_bytes([table[path]], sharder, "float32")
        total = measured[title].arguments + measured[title].resident
        assert total == close(params // 2 + 4 * weight)


def test_scoring_holds_the_scope_once_and_batches_of_it_twice(measured):
    sharder, table = sharder_of(8, tensor=2), param_table(CONFIG)
    scope, stacked = table.scope("block_linear"), [row for row in table if row.stacked]
    blocks, scored = (device_bytes(rows, sharder, "float32") for rows in (stacked, scope))
    rest = device_bytes([row for row in table if not row.stacked], sharder, "float32")
    hidden = 32 * CONFIG.embed_dim * 4  # a sample on each part of the batch axis
    score, close = measured["score backward"], functools.partial(pytest.approx, abs=512)
    sums = scored // CONFIG.num_layers
    assert score.arguments == close(blocks + sums + 2 * hidden)  # in and out of one block
    samples = SETTINGS.score.samples // sharder.batch_ways
    kept = CONFIG.num_layers + 1
    assert score.resident == rest + kept * samples * hidden
    [program] = programs(SETTINGS.override({"score.mode": "batched"}), CONFIG, sharder, ["score"])
    batched = measure(program, present(sharder), sharder)
    assert batched.arguments == close(blocks + rest + scored) and batched.resident == 0
    assert batched.arguments > score.arguments + 512


def test_a_result_in_another_dtype_takes_its_own_room():
    sharder, scope = sharder_of(8, tensor=2), param_table(CONFIG).scope("block_linear")
    same, other = (
        resident_bytes(SETTINGS.override({"export.dtype": dtype}), CONFIG, sharder, scope[:1])
        for dtype in ("keep", "float32")
    )
    assert other - same == device_bytes(scope[1:], sharder, "float32")


def test_global_top_sets_need_all_patches_and_scores_at_once():
    sharder, scope = sharder_of(8, tensor=2), param_table(CONFIG).scope("block_linear")
    matrix, whole = (
        resident_bytes(
            SETTINGS.override({"patch.granularity": granularity}), CONFIG, sharder, scope[:1]
        )
        for granularity in ("matrix", "global")
    )
    assert whole - matrix == 4 * device_bytes(scope[1:], sharder, "float32")


def test_flops_of_devices_that_share_the_work(measured):
    f = measured["train"]
    assert f.work.flops == pytest.approx(f.flops / 8, rel=0.02)


def test_needed_flops_are_fewer_than_those_computed(measured):
    shares = utilisation(measured.values())
    assert list(shares) == ["train", "score", "decode"]
    for name, share in shares.items():
        parts = [f for f in measured.values() if f.step == name]
        computed, needed = sum(f.flops for f in parts), parts[0].least_flops
        assert 0.4 * computed < needed < computed
        assert needed == {f.least_flops for f in parts}.pop()
        seconds = max(whole_floor(parts).values())
        assert share == pytest.approx(needed / 8 / CHIPS["v5e"].flops / seconds)
    (line,) = [line for line in report.table(list(measured.values())) if "MFU" in line]
    assert f"train {shares['train']:.1%}, score {shares['score']:.1%}, decode" in line


def test_batches_are_laid_out_as_they_are_put():
    sharder = sharder_of(8, tensor=2)
    assert lengths(SETTINGS) == (32, 8)
    assert abstract_batch(8, (32, 8), sharder)["tokens"].sharding.shard_shape((8, 32)) == (2, 32)
    assert abstract_batch(6, (32, 8), sharder)["targets"].sharding.is_fully_replicated


def test_where_the_architecture_comes_from(tmp_path):
    with pytest.raises(ValueError, match="architecture is not known.*--model.architecture=FILE"):
        architecture(SETTINGS)
    with pytest.raises(ValueError, match="No file '/nowhere.json'"):
        architecture(SETTINGS.override({"model.architecture": "/nowhere.json"}))
    (tmp_path / "stand_in.json").write_text(json.dumps(tiny_config(num_hidden_layers=3)))
    stand_in = SETTINGS.override(
        {"model.source": "absent", "model.architecture": str(tmp_path / "stand_in.json")}
    )
    assert architecture(stand_in).num_layers == 3
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=5)))
    assert architecture(stand_in.override({"model.source": str(tmp_path)})).num_layers == 5


def test_mistakes_are_named():
    sharder = sharder_of(8, tensor=2)
    with pytest.raises(
        ValueError, match="Unknown program 'export'; there are train, score, patch, decode"
    ):
        programs(SETTINGS, CONFIG, sharder, ["train", "export"])
    odd = config_from_hf(tiny_config(num_key_value_heads=1, num_attention_heads=4))
    with pytest.raises(ValueError, match="'kv_heads' of 1 does not divide by mesh axes tensor = 2"):
        programs(SETTINGS, odd, sharder)


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (57.74G) exceeds available HBM (15.75G).",
            int(57.74 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.23G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.48G.",
            int(17.23 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: hbm is full", 0),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INVALID_ARGUMENT: hbm", None),
    ],
)
def test_refusals_for_lack_of_memory(message, needed):
    assert memory_needed(message) == needed


class _Refuses:
    """A traced program whose compilation fails."""

    jaxpr = jax.make_jaxpr(lambda x: x)(1.0)

    def __init__(self, message):
        self.message = message

    def lower(self):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_refused_program_does_not_fit_and_other_errors_say_where():
    sharder = sharder_of(8)
    target = dataclasses.replace(present(sharder), memory=16 * GIB)
    program = compiling.Program(
        "train",
        "",
        lambda: _Refuses(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (57.74G) exceeds available HBM (15.75G)."
        ),
        resident=GIB,
    )
    f = measure(program, target, sharder)
    assert not f.fits
    assert report.verdict([f]) == "Verdict: does not fit. train needs 58.74 GiB of 16.00 GiB."
    assert "does not fit" in report.table([f])[1]
    broken = dataclasses.replace(
        program, trace=lambda: _Refuses("INTERNAL: a fault of the compiler")
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of the compiler") as raised:
        measure(broken, target, sharder)
    assert "While compiling 'train' for 8 x" in raised.value.__notes__[0]


def test_roofline():
    chip = CHIPS["v5e"]
    gather, reduce = Collective("all-gather", 10**9, 2), Collective("all-reduce", 10**9, 4, count=3)
    work = ProgramWork((gather, reduce), traffic=819 * 10**9, flops=197 * 10**12)
    assert least_times(work, 2 * 197e12, chip) == pytest.approx(
        {"compute": 2, "memory": 1, "links": 5.5e9 / 200e9}
    )
    work = dataclasses.replace(work, collectives=(gather, dataclasses.replace(reduce, across=True)))
    assert least_times(work, 0, chip) == pytest.approx(
        {"compute": 1, "memory": 1, "links": 1e9 / 200e9, "network": 4.5e9 / 3.125e9}
    )


def test_figures_for_the_devices_at_hand():
    lines = report.figures(SETTINGS, CONFIG, sharder_of(8, tensor=2))
    assert lines[0].startswith("Memory of train: trained weights ")
    assert lines[1].startswith("Memory of score: scored weights, then sums ")
    assert [line.split("  ")[0].split(",")[0] for line in lines[3 : 3 + len(TITLES)]] == TITLES
    assert "how much these devices have is not known" in lines[-1]
    assert not any("floor" in line for line in lines)
    assert any(line.startswith("  train: ") and "all-gather" in line for line in lines)
    (quick,) = report.figures(SETTINGS, CONFIG, sharder_of(8, tensor=2), compiled=False)
    assert quick.startswith("A train step takes about ")


def test_ladders():
    settings = SETTINGS.override({"derive.batch_size": 16, "evaluate.batch_size": 16})

    def flags(kind, blocks=True):
        return [as_flags(changes) for changes in ladder(kind, settings, 4, blocks)]

    full, layerwise = "--model.remat=full", "--derive.train=scope --derive.backward=layerwise"
    assert flags("train") == [
        "--model.remat=dots",
        full,
        full + " --derive.accumulate=2",
        full + " --derive.accumulate=4",
        layerwise,
        layerwise + " --derive.accumulate=2",
        layerwise + " --derive.accumulate=4",
        layerwise + " --derive.optimizer=adafactor",
        layerwise + " --derive.optimizer=adafactor --derive.accumulate=2",
        layerwise + " --derive.optimizer=adafactor --derive.accumulate=4",
    ]
    assert flags("score") == ["--score.inputs=some"] and flags("patch") == []
    assert flags("train", blocks=False)[4:] == [  # there is no layerwise pass
        full + " --derive.accumulate=4 --derive.optimizer=adafactor",
        full + " --derive.optimizer=adafactor",
    ]
    assert flags("score", blocks=False) == ["--model.remat=dots", full]
    assert flags("decode") == ["--evaluate.batch_size=8", "--evaluate.batch_size=4"]
    settings = settings.override({"align.enabled": True})  # whose step is the whole tree's
    assert f"{full} {layerwise} --derive.optimizer=adafactor" in flags("train")


def test_a_scope_beyond_the_blocks_has_no_layerwise_pass():
    """The head is in the scope of all linear layers, where it is not tied to the embedding."""
    scopes = {"block_linear": True, "all_linear": True, "all": False}
    for scope, blocks in scopes.items():
        assert in_blocks(SETTINGS.override({"patch.scope": scope}), CONFIG) == blocks
    untied = dataclasses.replace(CONFIG, tied_head=False)
    assert not in_blocks(SETTINGS.override({"patch.scope": "all_linear"}), untied)
    settings = SETTINGS.override({"patch.scope": "all"})

    def rule(kind, settings):
        too_much = kind == "train" and settings.derive.optimizer == "adamw"
        return (9 if too_much else 1) * GIB, 1.0

    changes = _Pretended(rule, 8 * GIB).fit(settings).changes
    assert changes == {"model.remat": "full", "derive.optimizer": "adafactor"}


class _Pretended(Planner):
    """A planner that takes from a rule what its programs need, in place of the compiler."""

    def __init__(self, rule, memory):
        super().__init__(CONFIG, Target("8 x nothing", tuple(jax.devices()), CHIPS["v5e"], memory))
        self.kinds = []
        self._rule = rule

    def _measure(self, settings, kind):
        self.kinds.append(kind)
        peak, seconds = self._rule(kind, settings)
        floor = {"compute": seconds}
        return (Figures(kind, kind, self._target.memory, 0.1, 1, 0, peak=peak, floor=floor),)


def rule_of_two(kind, settings):
    """Too much for a whole batch of training, and for more than 8 sequences of decoding."""
    if kind == "train":
        return 9 if settings.derive.accumulate < 2 else 1
    return 9 if kind == "decode" and settings.evaluate.batch_size > 8 else 1


@pytest.mark.parametrize(
    "rule, flags",
    [
        (
            lambda kind, s: 9 if kind == "train" and s.model.remat == "none" else 1,
            "--model.remat=dots",
        ),
        (
            rule_of_two,
            "--model.remat=full --derive.accumulate=2 --evaluate.batch_size=8",
        ),
        (
            lambda kind, s: 9 if kind == "train" and s.derive.optimizer == "adamw" else 1,
            "--derive.train=scope --derive.backward=layerwise --derive.optimizer=adafactor",
        ),
        (
            lambda kind, s: 9 if kind == "train" and s.derive.backward == "whole" else 1,
            "--derive.train=scope --derive.backward=layerwise",
        ),
        (
            lambda kind, s: 9 if kind == "score" and s.score.inputs != "some" else 1,
            "--score.inputs=some",
        ),
        (
            lambda kind, s: 9 if kind == "train" and "tensor:4" not in s.mesh.shape else 1,
            "--mesh=data:1,fsdp:2,tensor:4",
        ),
        (lambda kind, s: 9 if kind == "patch" else 1, None),
    ],
)
def test_the_nearest_settings_that_fit(rule, flags):
    settings = SETTINGS.override(
        {"derive.batch_size": 16, "evaluate.batch_size": 16, "mesh.shape": "fsdp:4,tensor:2"}
    )
    planner = _Pretended(lambda kind, s: (rule(kind, s) * GIB, 1.0), 8 * GIB)
    fit = planner.remedy(settings)
    assert (fit and as_flags(fit.changes)) == flags
    lines = report.remedy_lines(fit, settings, CONFIG, planner._target, sharder_of(8, tensor=2))
    if fit:
        assert lines[0] == f"Nearest setting that fits: {flags}"
        assert {f.kind for f in fit.figures} == set(PROGRAMS)
    else:
        assert lines[0].startswith("No setting of remat, micro-batches")


@pytest.mark.parametrize(
    "name, value, kinds",
    [
        ("derive.accumulate", 2, ["train"]),
        ("model.remat", "full", ["train", "score"]),
        ("evaluate.batch_size", 4, ["decode"]),
        ("patch.alpha", 2.0, ["score", "patch"]),
        ("patch.scope", "all", ["train", "score", "patch"]),
    ],
)
def test_a_program_is_compiled_again_only_for_settings_that_it_depends_on(name, value, kinds):
    planner = _Pretended(lambda kind, s: (1, 1.0), 8 * GIB)
    planner.all(SETTINGS)
    planner.all(SETTINGS.override({name: value}))
    assert planner.kinds == [*PROGRAMS, *kinds]


def test_what_cannot_fit_is_not_compiled():
    planner = _Pretended(lambda kind, s: (1, 1.0), memory=1000)
    assert planner.remedy(SETTINGS) is None and "train" not in planner.kinds
    lines = report.remedy_lines(None, SETTINGS, CONFIG, planner._target, sharder_of(8))
    assert "chips or more are needed" in lines[0]


def test_suggestions_are_the_shortest_steps_that_fit():
    def rule(kind, settings):
        tensor = int(settings.mesh.shape.split("tensor:")[1]) if kind == "train" else 1
        peak = 9 if kind == "train" and settings.model.remat == "none" else 1
        return peak * GIB, {1: 3.0, 2: 1.0, 4: 2.0}[tensor]

    planner = _Pretended(rule, 8 * GIB)
    compiled, fit = planner.suggest(SETTINGS, most=20)
    assert len(compiled) == 9 and [f.fits for _, f in compiled] == [True] * 6 + [False] * 3
    assert fit.changes["mesh.shape"] == "data:1,fsdp:4,tensor:2"
    assert fit.changes["model.remat"] in ("dots", "full")
    lines = report.suggestion_lines(compiled, fit)
    assert lines[2].startswith("data:1,fsdp:4,tensor:2")
    assert any(line.startswith("Best: --mesh=") for line in lines)


def test_a_step_of_several_programs_takes_the_most_memory_and_all_the_time():
    parts = []
    for name, peak, seconds in (("a", 3, 1.0), ("b", 5, 2.0)):
        floor = {"compute": seconds, "memory": 2 * seconds}
        parts.append(Figures(name, "train", 8, 0.1, 7, 0, peak=peak, floor=floor))
    whole = step(parts)
    assert whole.required == 5 and whole.flops == 14
    assert whole.floor == {"compute": 3.0, "memory": 6.0}


def test_screening_follows_settings():
    sharder = sharder_of(8, tensor=2)

    def screen(**changes):
        settings = SETTINGS.override({"derive.batch_size": 32} | changes)
        return screen_train(settings, CONFIG, sharder, (512, 8), CHIPS["v5e"], 10**12)

    base = screen()
    assert screen(**{"model.remat": "dots"}).memory < base.memory
    assert screen(**{"derive.accumulate": 4}).memory < base.memory
    assert screen(**{"derive.optimizer": "adafactor"}).arguments == base.arguments // 3
    assert base.least < base.memory and base.seconds > 0
    table = param_table(CONFIG)
    scope = table.scope("block_linear")
    trained = device_bytes(scope, sharder, "float32")
    others = device_bytes([row for row in table if row not in scope], sharder, "bfloat16")
    small = {"derive.train": "scope", "derive.optimizer": "adafactor"}
    whole, layerwise = screen(**small), screen(**small | {"derive.backward": "layerwise"})
    assert whole.arguments == layerwise.arguments == trained + others
    assert whole.least - whole.arguments == trained
    assert layerwise.least - layerwise.arguments == trained // CONFIG.num_layers


def test_a_collective_along_one_axis_of_a_torus_has_its_links_alone():
    places = [(x, y, 0) for x in range(2) for y in range(2)]
    devices = [types.SimpleNamespace(coords=place) for place in places]
    row = Collective("all-gather", 10**9, 2, group=(0, 1))
    square = Collective("all-gather", 10**9, 4, group=(0, 1, 2, 3))
    v5e = CHIPS["v5e"]
    assert link_seconds([row], v5e, devices) == pytest.approx(2 * row.sent / v5e.link)
    assert link_seconds([square], v5e, devices) == pytest.approx(square.sent / v5e.link)
    assert link_seconds([row], CHIPS["h100"]) == pytest.approx(row.sent / CHIPS["h100"].link)
