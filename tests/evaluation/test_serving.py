"""Continuous batching: rows are given on, few programs are compiled, the host looks seldom, and the
answers are those of sequences that run alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.evaluation.by_block import ByBlock
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Whole, placed_slots
from safepatch_jax.evaluation.serving import Rows, Server
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.cache import Cache

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in RNG.integers(1, 40, 24)]
NEW = 48


@pytest.fixture(scope="module")
def loaded(tiny, sharder):
    return load_params(tiny, sharder)


@pytest.fixture(scope="module")
def engine(tiny, sharder, loaded):
    return Engine(*loaded, tiny, sharder, batch_size=8)


@pytest.fixture(scope="module")
def alone(tiny, sharder, loaded):
    """Each prompt's whole answer, and a stop token that many have early and many not at all."""
    engine = Engine(*loaded, tiny, sharder)
    engine.stop_ids = ()
    answers = [engine.complete_ids([ids], NEW)[0] for ids in PROMPTS]

    def early_or_not_at_all(token):
        early = sum(token in ids[:10] for ids in answers)
        return min(early, sum(token not in ids for ids in answers))

    return answers, np.array([max(range(256), key=early_or_not_at_all)], np.int32)


@dataclasses.dataclass
class Counted:
    """A model, and how often the host asks it for anything."""

    model: object
    admitted: int = 0
    looks: int = 0
    shapes: tuple = ()

    @property
    def groups(self):
        return self.model.groups

    @property
    def shrinks(self):
        return self.model.shrinks

    def idle(self, *args):
        return self.model.idle(*args)

    def admit(self, *args):
        self.admitted += 1
        return self.model.admit(*args)

    def advance(self, state, *args):
        self.looks += 1
        self.shapes += (state.token_B.shape[0],)
        return self.model.advance(state, *args)

    def take(self, *args):
        return self.model.take(*args)


def up_to(ids, stops):
    ends = [k + 1 for k, token in enumerate(ids) if token in stops]
    return ids[: min(ends, default=len(ids))]


def serve(model, stops, rows=8, group=2):
    answers = {}
    server = Server(
        model, Rows(rows, group, 96, lambda n: -(-n // 16) * 16), stops, None, NEW, dict
    )
    server.run(list(enumerate(PROMPTS)), lambda i, ids: answers.__setitem__(i, ids.tolist()))
    return [answers[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", [ByBlock, Whole])
def test_answers_are_those_of_sequences_alone(engine, alone, kind):
    free, stops = alone
    model = Counted(kind(engine.decoder, engine.params))
    expected = [up_to(ids, stops) for ids in free]
    lengths = sorted(map(len, expected))
    assert lengths[5] <= 10 and lengths[-3] == NEW, "answers end neither early nor late"
    assert serve(model, stops) == expected
    # The host looks when rows are to be given on, or left out, not at each token.
    assert model.admitted <= len(PROMPTS) // 2 + 4
    assert model.looks <= model.admitted + 4 < sum(lengths) / 8
    assert (min(model.shapes) < 8) == kind.shrinks


def test_rows_are_given_on(engine, alone):
    """Where rows wait for the longest of their batch, these prompts take 3 * NEW steps."""
    free, stops = alone
    steps = [0]

    class Stepped(ByBlock):
        def _step(self, *args):
            steps[0] += 1
            return super()._step(*args)

    answers = serve(Stepped(engine.decoder, engine.params), stops)
    batches = [answers[start : start + 8] for start in range(0, len(answers), 8)]
    waiting = sum(max(map(len, batch)) for batch in batches)
    assert steps[0] < waiting - 10


@pytest.mark.parametrize("new, groups", [(8, 4), (60, 4), (64, 8), (100, 8)])
def test_prompts_are_read_in_fewer_groups_where_answers_are_short(
    tiny, sharder, loaded, new, groups
):
    engine = Engine(*loaded, tiny, sharder, batch_size=8)
    model = engine.model = Counted(ByBlock(engine.decoder, engine.params))
    assert model.groups == 8
    engine.complete_ids([list(range(30))] * 8, new)
    assert model.admitted == groups


def test_compilations_of_an_evaluation(tiny, sharder, loaded):
    """Few, whatever the prompts' lengths; none for a second one."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine = Engine(*loaded, tiny, sharder, batch_size=6)  # no other test has six rows
    engine.complete_ids(PROMPTS, NEW)
    first = len(compiled)
    engine.complete_ids(PROMPTS[::-1], NEW)
    assert 0 < first <= 20 and len(compiled) == first


@pytest.mark.parametrize("new", [1, 2])
def test_very_short_answers(tiny, sharder, loaded, alone, new):
    engine = Engine(*loaded, tiny, sharder, batch_size=8)
    engine.stop_ids = ()
    assert engine.complete_ids(PROMPTS, new) == [ids[:new] for ids in alone[0]]


def test_weights_are_not_copied(engine):
    if not engine.sharder.one_cpu:
        pytest.skip("the weights of several devices lie with each")
    stacked = engine.params["layers"]["mlp"]["gate"]
    blocks = [block["layers"]["mlp"]["gate"] for block in engine.model.blocks]
    size = stacked.nbytes // len(blocks)
    start = stacked.unsafe_buffer_pointer()
    assert [x.unsafe_buffer_pointer() for x in blocks] == [
        start + i * size for i in range(len(blocks))
    ]


@pytest.mark.parametrize("mesh", ["data:1,fsdp:4,tensor:2", "data:4,fsdp:1,tensor:2"])
def test_a_mesh_gives_the_same(tiny, alone, mesh):
    free, stops = alone
    sharder = Sharder(make_mesh(mesh))
    engine = Engine(*load_params(tiny, sharder), tiny, sharder, batch_size=8)
    assert isinstance(engine.model, Whole)
    engine.stop_ids = tuple(stops.tolist())
    expected = [[t for t in up_to(ids, stops) if t not in stops] for ids in free]
    assert engine.complete_ids(PROMPTS, NEW) == expected


def test_a_row_keeps_nothing_of_the_sequence_before():
    """A NaN would be seen through its weight of 0."""
    broken = jnp.full((2, 4, 3, 8, 5), jnp.nan)
    new = jnp.ones((2, 2, 3, 6, 5))
    cache = placed_slots(Cache(broken, broken), Cache(new, new), jnp.array([1, 4]))
    row = np.asarray(cache.k[:, 1])
    assert (row[:, :, :6] == 1).all() and (row[:, :, 6:] == 0).all()
    assert np.isnan(np.asarray(cache.v)[:, [0, 2, 3]]).all()  # 4 is no row
