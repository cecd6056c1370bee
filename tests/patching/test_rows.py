"""A merging method is one row: everything that depends on the method reads it, also a new one."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from safepatch_jax.patching import methods
from safepatch_jax.patching.importances import IMPORTANCES, Importance
from safepatch_jax.patching.methods import MERGE_METHODS, describe
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.settings import Settings, declared_options
from tests.patching.cases import FEW, inputs, run

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = pathlib.Path(methods.__file__).read_text(encoding="utf-8")

# Reads methods.py with the example of docs/compare.md in it, as if it had been added there.
WITH_THE_EXAMPLE = """
import sys, types
import safepatch_jax.patching as package
module = types.ModuleType("safepatch_jax.patching.methods")
sys.modules[module.__name__] = package.methods = module
exec(compile(sys.argv[1], "methods.py", "exec"), module.__dict__)

from absl import flags
from launch import options
from safepatch_jax.settings import Settings

assert "same_sign" in flags.FLAGS["merge"].parser.enum_values
assert not {"jax", "flax", "numpy"} & set(sys.modules)  # --help is quick

import numpy as np
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.run.published import describe_patch
from tests.patching.cases import FEW, inputs, run

settings = Settings().override({"patch.merge": "same_sign", "patch.density": 0.5})
theta, derived, _ = inputs(rows=FEW)
merged, statistics = run(theta, derived, {}, settings.patch, rows=FEW)
for path, backbone in theta.items():
    changed = merged[path] != backbone
    se, osm = (np.sign(derived[role][path] - backbone)[changed] for role in ("se", "osm"))
    assert 0.1 < changed.mean() < 0.4 and (se == osm).all()
print(describe_patch(settings.to_dict()))
print(METHODS["same_sign"].label, *METHODS["same_sign"].options)
"""


def test_the_example_of_the_docs():
    text = (ROOT / "docs" / "compare.md").read_text().partition("## Adding a merge method")[2]
    function, row = re.findall(r"```python\n(.*?)```", text, re.S)
    start, end = "_EQUAL = {", "\n    )\n}\n\n\ndef merge_method"
    assert SOURCE.count(start) == SOURCE.count(end) == 1 and text.count("\n") <= 25
    source = SOURCE.replace(start, f"{function}\n\n{start}").replace(end, f"\n{row}{end}")
    result = subprocess.run(
        [sys.executable, "-c", WITH_THE_EXAMPLE, source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "Merged by same sign: density 0.5 per matrix, alpha = 1, beta = 1, scope block_linear",
        "same sign patch.alpha patch.beta patch.density",
    ]


@pytest.mark.parametrize(
    "name, wrong, right", [("merge", "tie", "ties"), ("importance", "detla", "delta")]
)
def test_a_wrong_name_is_refused_at_once(name, wrong, right):
    with pytest.raises(ValueError, match=f"must be one of .*did you mean '{right}'"):
        Settings().override({f"patch.{name}": wrong})
    patch = PatchSettings(**{name: wrong})
    with pytest.raises(ValueError, match=f"There is no .*did you mean '{right}'"):
        run(*inputs(rows=FEW), patch, rows=FEW)
    with pytest.raises(ValueError, match=f"There is no .*did you mean '{right}'"):
        describe(Settings().to_dict()["patch"] | {name: wrong}, "per_sample")


def test_rows_name_settings_that_there_are():
    options = {name.removeprefix("patch.") for name in declared_options() if "patch." in name}
    for method in MERGE_METHODS.values():
        assert {*method.settings, *method.comparison} <= options, method.name
        values = {f"patch.{name}": value for name, value in method.comparison.items()}
        Settings().override(values | {"patch.merge": method.name})


def test_an_importance_is_a_row(monkeypatch):
    """The first half of each tensor's entries counts nothing."""

    def late(entries):
        return abs(entries.patch) * (
            np.arange(entries.patch.size) * 2 >= entries.patch.size
        ).reshape(entries.patch.shape)

    monkeypatch.setitem(IMPORTANCES, "late", Importance("late", late, "late entries", "late"))
    patch = PatchSettings(importance="late", combine="union", retention=1.0)
    theta, derived, _ = inputs(rows=FEW)
    merged, statistics = run(theta, derived, {}, patch, rows=FEW)
    for row in FEW:
        matrices = zip(row.as_matrices(merged[row.path]), row.as_matrices(theta[row.path]))
        for ours, backbone in matrices:
            changed = np.flatnonzero(ours != backbone)
            assert len(changed) and changed.min() * 2 >= backbone.size
    settings = Settings().to_dict()
    assert "importance late, " in describe(settings["patch"] | {"importance": "late"}, "")
