"""What is noted of the judges whose verdicts lie in a folder."""

import pytest

from safepatch_jax.evaluation.answers import JUDGE, READING, claim_judges
from safepatch_jax.evaluation.judges.open import open_judge
from safepatch_jax.evaluation.lines import verdicts_of
from safepatch_jax.runtime.files import read_json, write_json

TEXT = "endpoint:http://127.0.0.1:9/v1?model=x"


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("SAFEPATCH_API_KEY", "none")
    return {TEXT: open_judge(TEXT, None)}  # nothing is asked


def test_a_judge_of_content_notes_how_it_is_read(judge, tmp_path):
    claim_judges(judge, tmp_path)
    note = tmp_path / verdicts_of(TEXT) / JUDGE
    assert read_json(note) == {"judge": TEXT, "files": {}, "reading": READING}
    claim_judges(judge, tmp_path)  # the same again
    claim_judges({"phrases": open_judge("phrases", None)}, tmp_path)
    assert not (tmp_path / verdicts_of("phrases")).exists()


def test_verdicts_that_were_read_otherwise_are_refused(judge, tmp_path):
    place = tmp_path / verdicts_of(TEXT)
    place.mkdir(parents=True)  # of a version that noted nothing
    for note in (None, {"judge": TEXT, "files": {}}, {"judge": TEXT, "files": {}, "reading": 1}):
        if note is not None:
            write_json(place / JUDGE, note)
        with pytest.raises(ValueError, match="took harmless answers for refused ones. Delete "):
            claim_judges(judge, tmp_path)
