"""How far a run is, and how long it still takes."""

from safepatch_jax.run import manifests
from safepatch_jax.run.pace import Pace, recorded


def test_time_left_is_said_where_there_is_a_basis():
    pace = Pace(["import", "derive", "evaluate"], {}, {"derive": 10.0, "evaluate": 20.0})
    assert pace.before("import") == ", stage 1 of 3"
    pace.done("import", 5.0)
    assert pace.before("derive") == ", stage 2 of 3" and pace.seconds_left() is None
    pace.done("derive", 30.0)
    assert pace.before("evaluate") == ", stage 3 of 3, about 60 s left"
    assert pace.before("another") == ""


def test_what_stages_took_before_counts_first():
    pace = Pace(["derive", "evaluate"], {"derive": 40.0, "evaluate": 30.0}, {"derive": 1.0})
    assert pace.before("derive") == ", stage 1 of 2, about 70 s left"


def test_what_a_stage_took_with_another_model_does_not_count(tmp_path):
    for number, (model, seconds) in enumerate([("small", 1.0), ("large", 100.0), (None, 50.0)]):
        folder = tmp_path / f"derive_se-{number}"
        folder.mkdir()
        of_model = {} if model is None else {"model": model}  # None: of an earlier version
        manifest = {"stage": "derive_se", "key": 64 * "0", "result": {}, "outputs": {}}
        about = {"deleted": False, "seconds": seconds, "finished": f"2026-01-0{number + 1}"}
        manifests.write(folder, manifest | about | of_model)
    assert recorded(["derive_se"], [tmp_path], "small") == {"derive_se": 1.0}
    assert recorded(["derive_se"], [tmp_path], "other") == {}
