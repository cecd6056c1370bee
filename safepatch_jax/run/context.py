"""What the stages of a run share: mesh, records, tokenised examples, loaded models, compiled
programs."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from safepatch_jax.data.chat import Chat, Encoded, answer_pairs
from safepatch_jax.data.pipeline import Pool, training_batches
from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.io.hf import StoredModel, load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching.options import scope_rows
from safepatch_jax.patching.sensitivity import SensitivityMeter, witness_row
from safepatch_jax.run.inputs import Inputs, Read
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import DeriveSettings, ModelSettings, ScoreSettings, Settings
from safepatch_jax.training.batch import check_batch
from safepatch_jax.training.journal import Recipe, Recorder, ignore
from safepatch_jax.training.losses import Likelihood, Loss
from safepatch_jax.training.step import Saving, Trainer, TrainingOutcome


class Context(Inputs):
    """What stages share on the devices; everything is made on first use and kept, so that stages
    which follow one another compile once.

    Args:
      settings, read: see `Inputs`.
      inputs: those of the same settings, where they are at hand: nothing is read twice.
    """

    def __init__(self, settings: Settings, read: Read = load_records, inputs: Inputs | None = None):
        if inputs is None:
            super().__init__(settings, read)
        else:
            vars(self).update(vars(inputs))
        # Caches of this object alone: one on the class would keep every context alive.
        self.trainer = functools.cache(self._trainer)
        self.meter = functools.cache(self._meter)
        self.chat = functools.cache(self._chat)
        self.encoded = functools.cache(self._encoded)

    def with_settings(self, settings: Settings) -> Context:
        """Return a context of other settings that reads records as this one does."""
        context = Context(settings, self._read)
        old, new = self.settings.evaluate, settings.evaluate
        same_thoughts = (old.thinking, old.think_tokens) == (new.thinking, new.think_tokens)
        if settings.data == self.settings.data and same_thoughts:
            context.prompt_format = self.prompt_format
        return context

    @functools.cached_property
    def sharder(self) -> Sharder:
        return Sharder(make_mesh(self.settings.mesh.shape))

    def decoder(self, config: DecoderConfig) -> Decoder:
        """Return the decoder of generation and evaluation.

        Its batch is cut over the data axis alone: weights that are cut over fsdp then stay where
        they are, and for each token activations move, which are far smaller.
        """
        return Decoder(
            config,
            jnp.dtype(self.settings.model.compute_dtype),
            self.sharder.with_rules(batch=("data",)),
        )

    def training_decoder(self, config: DecoderConfig) -> Decoder:
        """Return the decoder of programs that take gradients."""
        return _training_decoder(self.settings.model, self.sharder, config)

    def check_batches(self) -> None:
        """Raise ValueError if a batch size, derive.accumulate and the mesh do not go together, or
        settings of derivation do not."""
        for name, rows in self.settings.step_rows.items():
            check_batch(name, rows, self.settings.derive.accumulate, self.sharder)
        derive = self.settings.derive
        if derive.store != "float32" and derive.train != "scope":
            raise ValueError(
                f"--derive.store={derive.store} keeps differences within the patch scope alone. "
                "Add --derive.train=scope, or use --derive.store=float32."
            )
        if derive.backward == "layerwise" and derive.train != "scope":
            raise ValueError(
                "--derive.backward=layerwise trains the patch scope alone. Add "
                "--derive.train=scope, or use --derive.backward=whole."
            )
        if derive.backward == "layerwise" and self.settings.patch.scope == "all":
            raise ValueError(
                "--derive.backward=layerwise trains weights of the blocks alone, and "
                "--patch.scope=all has others. Use --derive.backward=whole, or "
                "--patch.scope=block_linear."
            )

    def engine(self, folder: pathlib.Path, params: Any) -> Engine:
        """Return a model that is ready to answer.

        Args:
          folder: whose architecture, tokenizer and chat template it has.
          params: nested parameters on the mesh.

        Raises:
          ValueError: no chat template, nor one in the settings.
        """
        settings = self.settings
        return Engine(
            read_hf_config(folder),
            params,
            folder,
            self.sharder,
            settings.model.compute_dtype,
            settings.evaluate.batch_size,
            settings.data.date,
            self.prompt_format,
            self.chat(folder),
        )

    def _trainer(
        self, config: DecoderConfig, loss: Loss | None = None, scope: bool = False
    ) -> Trainer:
        """Return the train step of a loss, by default of the patches' likelihood; 'scope': which
        trains the patch scope alone."""
        model = dataclasses.replace(self.settings.model, source="", architecture="")
        derive, of = self.settings.derive, self.settings.patch.scope
        return _trainer_of(model, derive, of, self.sharder, config, loss, scope)

    def tune(
        self,
        folder: pathlib.Path,
        pools: Sequence[Pool],
        recipe: Recipe,
        title: str,
        steps: pathlib.Path,
        record: Recorder = ignore,
        loss: Loss | None = None,
        seed: int | None = None,
        patches: bool = False,
    ) -> tuple[dict[str, Any], TrainingOutcome]:
        """Tune the model of a folder.

        Args:
          folder: a Hugging Face folder.
          pools: (examples, rows of a batch) pairs.
          recipe, title, record: see `Trainer.run`.
          steps: the folder of its checkpoints.
          loss: by default the patches' likelihood. One that compares is given the model as it was
            before tuning.
          seed: of the batch order, if not the run's.
          patches: train what derive.train says, not all.

        Returns:
          (nested parameters float32, of the trained ones alone; outcome).
        """
        local = None  # all rows of a batch
        if processes.several():
            local = self.sharder.local_rows(sum(rows for _, rows in pools))
        seed = self.settings.run.seed if seed is None else seed
        scope = patches and self.settings.derive.train == "scope"
        trainer = self.trainer(read_hf_config(folder), loss, scope)
        buckets = self.settings.data.length_buckets
        batches = training_batches(pools, seed, buckets, local, trainer.compact)
        saving = Saving(steps, self.settings.run.checkpoint_minutes)
        model, reference = StoredModel(folder, self.sharder), None
        if loss is not None and loss.compares:
            model = reference = self.load(folder)[1]
        return trainer.run(model, batches, recipe, title, saving, record, reference)

    def _meter(self, config: DecoderConfig, witness: bool = False) -> SensitivityMeter:
        """Return the meter of the scope, or of the one weight on which the score modes are
        compared."""
        rows = scope_rows(param_table(config), self.settings.patch)
        if witness:
            rows = (witness_row(rows),)
        settings = self.settings
        loss, chunk = settings.derive.loss, settings.model.loss_chunk
        return _meter_of(self.training_decoder(config), rows, loss, chunk, settings.score)

    def _chat(self, folder: pathlib.Path) -> Chat:
        size, date = read_hf_config(folder).vocab_size, self.settings.data.date
        return Chat(folder, size, date, self.prompt_format)

    def _encoded(
        self,
        folder: pathlib.Path,
        role: str,
        split: str,
        field: str = "answer",
        limit: int | None = None,
    ) -> Encoded:
        """Tokenise one split of a role, so many records at most (by default as the settings have
        it); says once what was left out or cut."""
        data = self.settings.data
        room = read_hf_config(folder).max_length
        evaluate = self.settings.evaluate
        answer = max(data.max_answer_tokens, evaluate.max_new_tokens + evaluate.think_tokens)
        if data.max_prompt_tokens + answer > room:
            raise ValueError(
                "data.max_prompt_tokens and data.max_answer_tokens or evaluate.max_new_tokens (and "
                f"think_tokens) add up to more than the {room} positions of the model. Lower them."
            )
        encoded = self.chat(folder).encode_all(
            answer_pairs(self.split(role, split, limit), field),
            data.max_prompt_tokens,
            data.max_answer_tokens,
        )
        limits = f"{data.max_prompt_tokens}/{data.max_answer_tokens}"
        say(f"  {role} ({split}, {field}): {encoded.describe(limits)}")
        return encoded

    def load(self, folder: pathlib.Path) -> tuple[DecoderConfig, dict[str, Any]]:
        return load_params(folder, self.sharder)


def _training_decoder(model: ModelSettings, sharder: Sharder, config: DecoderConfig) -> Decoder:
    return Decoder(
        config,
        jnp.dtype(model.compute_dtype),
        sharder,
        remat=model.remat,
        attention=model.attention,
    )


# Runs that follow one another in a process, as the links of a chain, share these: programs hold
# memory maps, of which a process has so many, and those of a run that has ended stay for long.
@functools.lru_cache(maxsize=4)
def _trainer_of(
    model: ModelSettings,
    derive: DeriveSettings,
    of: str,
    sharder: Sharder,
    config: DecoderConfig,
    loss: Loss | None,
    scope: bool,
) -> Trainer:
    table = param_table(config)
    return Trainer(
        _training_decoder(model, sharder, config),
        table,
        sharder,
        rows=table.scope(of) if scope else None,
        layerwise=scope and derive.backward == "layerwise",
        loss=loss or Likelihood(derive.loss),
        clip_norm=derive.clip_norm,
        optimizer=derive.optimizer,
        accumulate=derive.accumulate,
        chunk=model.loss_chunk,
    )


@functools.lru_cache(maxsize=4)
def _meter_of(
    decoder: Decoder, rows: tuple[Param, ...], loss: str, chunk: int, score: ScoreSettings
) -> SensitivityMeter:
    meter = decoder, rows, decoder.sharder, loss, chunk
    return SensitivityMeter(*meter, score.in_flight, score.inputs)
