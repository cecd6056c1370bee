"""Records from a prepared TFDS set, without TensorFlow."""

import sys

import pytest
import tensorflow_datasets as tfds

from safepatch_jax.data.records import load_records


class TinyHarmful(tfds.core.GeneratorBasedBuilder):
    """Three rows in AdvBench's columns."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"goal": tfds.features.Text(), "target": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"goal": f"goal {i} caf\u00e9", "target": f"Sure, {i}"}


def test_reads_a_prepared_set(tmp_path, monkeypatch):
    TinyHarmful(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    records = load_records("harmful", "tfds:tiny_harmful@train")
    assert sorted(r.prompt for r in records) == [f"goal {i} caf\u00e9" for i in range(3)]
    assert "tensorflow" not in sys.modules


def test_set_that_is_not_prepared():
    with pytest.raises(
        ValueError, match="tfds:no_such_set cannot be read as a data set prepared here"
    ):
        load_records("harmful", "tfds:no_such_set")


def test_without_the_packages_the_line_for_pip_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match="tfds:tiny.*needs array-record, not installed here.*'array-record>=0.8'"
    ):
        load_records("harmful", "tfds:tiny")
