"""The two models of a study: weights by parameter, from folders, or from one folder and a patch
file; never both whole in memory."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from safepatch_jax.evaluation.answers import fingerprint
from safepatch_jax.io.folder import Checkpoint, stored_dtypes
from safepatch_jax.io.hf import StoredModel
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import read_hf_config, same_architecture
from safepatch_jax.models.table import Param
from safepatch_jax.patch_file.apply import AFTER, BEFORE, SAME, verify
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.workers import Workers
from safepatch_jax.studies.durability.effects import BASE, MODEL, WHOS

_STATES = {BASE: BEFORE, MODEL: AFTER}


class Flipped(StoredModel):
    """The parameters of a patched model, of the backbone's folder and a patch file.

    Args:
      folder, sharder: see `load_params`; of the backbone.
      patch: its flips are done to what is read.

    Raises:
      ValueError: as `StoredModel`; layers of one parameter in several dtypes.
    """

    def __init__(self, folder: pathlib.Path, sharder: Sharder, patch: PatchFile):
        super().__init__(folder, sharder)
        self._patch = patch

    def read(self, row: Param, pool: Workers) -> jax.Array:
        """Read one parameter and flip its bits."""
        x = super().read(row, pool)
        names = [name for name in row.hf_names if self._patch.tensors[name].entries]
        if not names:
            return x
        layers = np.array(row.as_matrices(processes.fetch(x)))
        for layer, name in enumerate(row.hf_names):
            if name in names:
                self._flip(name, layers[layer])
        whole = layers.reshape(row.shape)
        return jax.make_array_from_callback(row.shape, x.sharding, lambda index: whole[index])

    def _flip(self, name: str, matrix: np.ndarray) -> None:
        tensor = self._patch.tensors[name]
        if str(matrix.dtype) != tensor.dtype:
            raise ValueError(
                f"{name} lies beside layers of other dtypes, and a patch's bits fit its own alone. "
                "Apply the patch to a folder (safepatch patch apply), and give that as --model."
            )
        bits = matrix.reshape(-1).view(BITS[tensor.dtype])
        for number, (positions, flips) in enumerate(self._patch.runs(name)):
            bits[number * RUN : (number + 1) * RUN][positions] ^= flips
        if hashlib.sha256(memoryview(bits.view(np.uint8))).hexdigest() != tensor.after:
            raise ValueError(
                f"{name} does not become what the manifest of {self._patch.path} says: the patch "
                "is damaged, or the folder was changed meanwhile. Copy the patch file again."
            )


class Pair:
    """A base model and the patched one.

    Args:
      base: the base's folder in Hugging Face format.
      model: the patched model's, '' for the base with the patch.
      patch: the patch file, '' for none; with both models it is checked against them.

    Attributes:
      folder: in Hugging Face format; its architecture and tokenizer are those of both.
      model_name: the patched model, in words.
      record: hashes that say which models these are.

    Raises:
      ValueError: a model is missing, of another architecture, or stored in another dtype; a patch
        file of another model, or a damaged one.
    """

    def __init__(self, base: str | pathlib.Path, model: str, patch: str):
        if not (model or patch):
            raise ValueError(
                "--model (the patched model's folder) or --patch (its file) is needed."
            )
        self.folder = pathlib.Path(base)
        self._folders = {BASE: self.folder}
        self.model_name = model or f"the base with {patch}"
        if model:
            self._folders[MODEL] = pathlib.Path(model)
            processes.on_first(self._check_model)
        self._patch = PatchFile(patch) if patch else None
        if self._patch:
            for who, folder in self._folders.items():
                processes.on_first(self._check_patch, who, folder)
        self.record = processes.on_first(self._record)

    def _record(self) -> dict[str, str]:
        record = {who: fingerprint(folder) for who, folder in self._folders.items()}
        if MODEL not in record:
            record[MODEL] = f"patch {files.file_sha256(self._patch.path)}"
        return record

    def _check_model(self) -> None:
        base, model = (self._folders[who] for who in WHOS)
        if not same_architecture(read_hf_config(base), read_hf_config(model)):
            raise ValueError(
                f"{model} and {base} are of different architectures. Give --base the model that "
                "was patched."
            )
        Checkpoint(model)
        dtypes, others = stored_dtypes(base), stored_dtypes(model)
        wrong = [name for name in dtypes if others.get(name, dtypes[name]) != dtypes[name]]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{len(wrong)} tensors of {model} are stored in another dtype than those of {base} "
                f"({name}: {others[name]}, {dtypes[name]}): the cast would pass for the patch. "
                "Convert the base to that dtype first: python -m launch.convert --source=hf:DIR "
                "--target=hf:DIR2 --dtype=..."
            )

    def _check_patch(self, who: str, folder: pathlib.Path) -> None:
        wanted = _STATES[who]
        states = verify(self._patch.path, folder)
        wrong = [name for name, state in states.items() if state not in (wanted, SAME)]
        if wrong:
            what = "the backbone" if who == BASE else "the patched model"
            raise ValueError(
                f"{folder} is not {what} of {self._patch.path}: {some(wrong, ', ', 3)} "
                f"{'is' if len(wrong) == 1 else 'are'} otherwise there. Give --{who} the folder "
                "that the patch belongs to, or leave out --patch."
            )

    def weights(self, sharder: Sharder) -> dict[str, Mapping[str, jax.Array]]:
        """Return by model its parameters, which are read when they are looked up."""
        result: dict[str, Mapping[str, jax.Array]] = {}
        for who, folder in self._folders.items():
            result[who] = StoredModel(folder, sharder)
        if MODEL not in result:
            result[MODEL] = Flipped(self.folder, sharder, self._patch)
        return result
