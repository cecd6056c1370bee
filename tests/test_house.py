"""The rules of the house: imports run one way, lines are short, one thought a line."""

import pathlib

import pytest

from benchmarks import house

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = house.modules(ROOT)
SOURCE = LIBRARY + house.modules(ROOT, "launch") + house.modules(ROOT, "benchmarks")
GRAPH = house.imports(LIBRARY)


def lines_of(count):
    """Name the places that a measure of the house counts, as file:line."""
    places = []
    for module in SOURCE:
        for line in count(module):
            places.append(f"{module.path.relative_to(ROOT)}:{line}")
    return places


def test_every_room_has_a_floor():
    known = {name for names in house.FLOORS for name in names}
    assert {house.room(module.name) for module in LIBRARY} - {""} <= known


def test_no_import_runs_upwards():
    assert house.upward(GRAPH) == []


def test_no_modules_import_one_another_in_a_circle():
    assert house.circles(GRAPH) == []


def test_no_room_is_over_a_fifth_of_the_whole():
    sizes = {}
    for module in LIBRARY:
        room = house.room(module.name)
        sizes[room] = sizes.get(room, 0) + module.text.count("\n")
    assert max(sizes.values()) <= sum(sizes.values()) / 5


def test_the_library_reads_no_flags():
    assert not [module.name for module in LIBRARY if "absl import flags" in module.text]


def test_patch_files_need_no_jax():
    rooms = ("patch_file", "registry")
    reached, todo = set(), [name for name in GRAPH if house.room(name) in rooms]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += GRAPH[name]
    trees = [module for module in LIBRARY if module.name in reached]
    assert "safepatch_jax.patch_file.file" in reached
    for module in trees:
        imported = {target.partition(".")[0] for target in house.top_level_imports(module.tree)}
        assert not imported & {"jax", "flax", "optax", "orbax"}, module.name


@pytest.mark.parametrize(
    "measure", ["nested_comprehensions", "named_lambdas", "crowded_statements"]
)
def test_one_thought_a_line(measure):
    assert lines_of(lambda module: getattr(house, measure)(module.tree)) == []


def test_lines_end_at_the_hundredth_column():
    assert lines_of(lambda module: house.long_lines(module.text)) == []


def test_no_module_is_longer_than_a_person_reads():
    long = {}
    for module in LIBRARY:
        lines = module.text.count("\n")
        if lines > 450:
            long[module.name] = lines
    assert long == {}


SMALL = """
import safepatch_jax.run
x = [a for a in (b for b in y)]
z = [a for a in y for b in a]
f = lambda: 1
v = (1 if a else 2) + (3 if b else 4)
"""


def test_the_measures_see_what_they_count(tmp_path):
    package = tmp_path / "safepatch_jax"
    for name in ("io", "run"):
        (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "io" / "__init__.py").write_text("")
    (package / "run" / "__init__.py").write_text("from safepatch_jax.io import a\n")
    (package / "io" / "a.py").write_text(SMALL)
    source = house.modules(tmp_path)
    graph = house.imports(source)
    assert house.upward(graph) == ["safepatch_jax.io.a -> safepatch_jax.run"]
    assert house.circles(graph) == [["safepatch_jax.io.a", "safepatch_jax.run"]]
    tree = {module.name: module.tree for module in source}["safepatch_jax.io.a"]
    assert house.nested_comprehensions(tree) == [3, 4]
    assert house.named_lambdas(tree) == [5] and house.crowded_statements(tree) == [6]
    assert house.long_lines("x " * 51 + "\n" + "x " * 50) == [1]
    assert "1 lines" not in house.figures(source)["longest function"]
