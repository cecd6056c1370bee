"""The public data sets as TensorFlow Datasets in array_record format; imports TFDS, not
TensorFlow."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import tensorflow_datasets as tfds

from safepatch_jax.data.sets import FIELDS, DataSet

Records = Mapping[str, Sequence[Mapping[str, str]]]  # flat texts, see FIELDS; by split


class SafetySets(tfds.core.GeneratorBasedBuilder):
    """Every set of `SETS`, as a TFDS config of its name: flat records of texts, see FIELDS.

    Args:
      entry: of the set.
      records: reads them, in file order.
      folder: in which they lie, or are to lie.
    """

    VERSION = tfds.core.Version("1.0.1")  # raise it whenever the same file gives other records

    def __init__(self, entry: DataSet, records: Callable[[], Records], folder: pathlib.Path):
        self._entry, self._records = entry, records
        config = tfds.core.BuilderConfig(name=entry.name, description=entry.description)
        super().__init__(file_format="array_record", config=config, data_dir=str(folder))

    def _info(self) -> tfds.core.DatasetInfo:
        entry = self._entry
        return tfds.core.DatasetInfo(
            builder=self,
            description=entry.description,
            homepage=entry.homepage,
            citation=entry.citation,
            license=entry.licence,
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in FIELDS}),
            # File order decides which of two near-duplicates stays.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self._records().items()}

    def _generate_examples(self, records):
        yield from enumerate(records)


def prepare(builder: SafetySets) -> None:
    """Write the records of a set to its folder."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):  # TFDS announces a download of unknown size
        builder.download_and_prepare()
