"""The certificate of an import or export: what was read or written, and that the model still
computes the same.

Every key accounted for, every tensor's SHA-256, and the logits of our decoder against those of
Hugging Face torch on the same folder; without torch, that the logits are finite and what perplexity
they give.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.records import load_records
from safepatch_jax.data.tokenizer import NoChat
from safepatch_jax.io.companions import companion_names
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.hf import check_keys, load_params
from safepatch_jax.io.names import listed
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.strays import adapter_of
from safepatch_jax.models.table import param_table
from safepatch_jax.run.published import CERTIFICATE
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, libraries, processes
from safepatch_jax.runtime.memory import available_memory
from safepatch_jax.runtime.reading import reading
from safepatch_jax.training.batch import put_batch

LIMIT = 1e-4  # of the largest logit; float32 against float32 differs by 1e-6 to 1e-5
_PROBES, _LENGTH = 4, 48


@dataclasses.dataclass(frozen=True)
class Probes:
    """Tokens on which a model is run.

    Attributes:
      tokens_BT: their ids.
      valid_BT: which of them are not padding.
      trouble: why they are random ids; None for text.
    """

    tokens_BT: np.ndarray
    valid_BT: np.ndarray
    trouble: str | None = None


def certify(
    folder: str | pathlib.Path,
    sharder: Sharder,
    *,
    logits: bool = True,
    kind: str,
    before: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Examine a model folder in Hugging Face format as it lies on disk.

    Args:
      folder: the folder that was read (import) or written (export).
      sharder: the mesh on which our decoder runs.
      logits: also run the model; otherwise names, shapes and hashes alone.
      kind: 'import' or 'export'.
      before: SHA-256 by tensor of the model that this one was made from; says which tensors
        changed.
      notes: what was left aside in the folder of that model, see `Checkpoint.notes`.

    Returns:
      the content of certificate.json.

    Raises:
      ValueError: keys that do not fit, a tokenizer that is damaged or of another model, logits that
        are not finite, or logits that are further than LIMIT, relative to the largest, from those
        of Hugging Face torch.
    """
    folder = pathlib.Path(folder)
    config = read_hf_config(folder)
    checkpoint = Checkpoint(folder)
    account = check_keys(checkpoint, param_table(config), config)
    hashes = processes.on_first(tensor_hashes, checkpoint.tensors)
    tensors = {}
    for name, x in checkpoint.tensors.items():
        tensors[name] = {"dtype": x.dtype, "shape": list(x.shape), "sha256": hashes[name]}
    certificate: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "architecture": dataclasses.asdict(config),
        "parameters": param_table(config).size,
        "keys": account,
        "tensors": tensors,
        "companions": {n: files.file_sha256(folder / n) for n in companion_names(folder)},
        "notes": [*notes, *checkpoint.notes],
    }
    if before is not None:
        changed = [name for name, digest in hashes.items() if before.get(name) != digest]
        certificate["unchanged"], certificate["changed"] = len(hashes) - len(changed), changed
    # Also where the model is not run: finds a tokenizer of another model.
    probes = _probes(folder, config.vocab_size)
    certificate["tokenizer"] = probes.trouble or "fits the embedding"
    certificate["logits"] = {"skipped": "not asked for"}
    if logits:
        certificate["logits"] = check_logits(folder, sharder, probes, _unlike_torch(checkpoint))
    return certificate | {"versions": versions()}


def recorded_hashes(folder: pathlib.Path) -> dict[str, str] | None:
    """Return the SHA-256 of each tensor from a folder's certificate; None if it was deleted."""
    path = folder / CERTIFICATE
    if not path.is_file():
        return None
    try:
        return {name: x["sha256"] for name, x in files.read_json(path)["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); delete it to convert without it."
        ) from error


def _unlike_torch(checkpoint: Checkpoint) -> str | None:
    """Say why transformers would make another model of a folder than we do; None if it would
    not."""
    if checkpoint.renamed:
        return "transformers does not read the names of its tensors"
    if adapter_of(checkpoint.folder):
        return "transformers would load the adapter beside it"
    return None


def check_logits(
    folder: pathlib.Path, sharder: Sharder, probes: Probes, unlike: str | None = None
) -> dict[str, Any]:
    """Run a folder's model in float32 on a few probe texts, here and in torch if it is there and
    `unlike` does not say why it is no witness; errors as `certify`."""
    config, params = load_params(folder, sharder)
    tokens_BT, valid_BT = probes.tokens_BT, probes.valid_BT
    decoder = Decoder(config, jnp.float32, sharder)
    # The batch must divide by the mesh; the probes are repeated to fill it.
    rows = math.ceil(_PROBES / sharder.batch_ways) * sharder.batch_ways
    shape = (rows, _LENGTH)
    full = {"tokens": np.resize(tokens_BT, shape), "valid": np.resize(valid_BT, shape)}
    batch, positions_BT = put_batch(full, sharder), np.broadcast_to(np.arange(_LENGTH), shape)
    with jax.default_matmul_precision("highest"):
        logits_BTV = _forward(decoder, params, batch["tokens"], positions_BT, batch["valid"])
    ours = processes.fetch(logits_BTV)[valid_BT]
    del params  # torch needs the memory
    if not np.all(np.isfinite(ours)):
        raise ValueError(
            f"{folder}: the logits are not finite. The weights hold NaN or overflow; check where "
            "they come from."
        )
    return {
        "probes": "text" if probes.trouble is None else "random",
        "tokens": int(valid_BT.sum()),
        "finite": True,
        "perplexity": _perplexity(probes, ours),
        "largest": float(np.max(np.abs(ours))),
        "torch": processes.on_first(
            _compare, folder, param_table(config).size, probes, ours, unlike
        ),
    }


def _perplexity(probes: Probes, logits_NV: np.ndarray) -> float:
    """Return the perplexity on the probes, of which the logits are those at the valid positions."""
    targets_BT = np.full_like(probes.tokens_BT, -1)  # none where no valid token follows
    targets_BT[:, :-1] = np.where(probes.valid_BT[:, 1:], probes.tokens_BT[:, 1:], -1)
    targets_N = targets_BT[probes.valid_BT]
    nll = []
    for logits_V, target in zip(logits_NV, targets_N):
        if target >= 0:
            nll.append(-_log_softmax(logits_V)[target])
    return math.exp(min(np.mean(nll), 700.0))


def _compare(
    folder: pathlib.Path,
    parameters: int,
    probes: Probes,
    ours: np.ndarray,
    unlike: str | None,
) -> dict[str, float] | str:
    """Compare logits with those of Hugging Face torch, or say why that cannot be done; errors as
    `certify`."""
    reason = _no_torch(parameters) or unlike
    if reason is not None:
        return f"not compared: {reason}"
    theirs = _torch_logits(folder, probes.tokens_BT, probes.valid_BT)
    result = {
        "max_abs_error": float(np.max(np.abs(ours - theirs))),
        "kl": float(np.mean([_kl(a, b) for a, b in zip(theirs, ours)])),
        "top1_agreement": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
    }
    if not result["max_abs_error"] <= LIMIT * np.max(np.abs(theirs)):
        raise ValueError(
            f"{folder}: our logits differ from those of Hugging Face torch by "
            f"{result['max_abs_error']:.3g} (largest logit {np.max(np.abs(theirs)):.3g}), far more "
            "than float32 rounding. Please report this with the model's config.json; "
            "--certify=hashes (or --run.certify=hashes) leaves the comparison out."
        )
    return result


def summary(certificate: Mapping[str, Any]) -> str:
    """Say in one line what a certificate holds."""
    keys, logits = certificate["keys"], certificate["logits"]
    text = f"{keys['matched']} of {keys['tensors']} tensors matched"
    if keys["left_out"]:
        text += f" ({listed(keys['left_out'], 3)} left out)"
    if "changed" in certificate:
        changed = len(certificate["changed"])
        text += f", {changed} changed, {certificate['unchanged']} bitwise as before"
    if "skipped" in logits:
        return text
    tokens = f"{logits['tokens']} {logits['probes']} tokens"
    text += f"; perplexity {logits['perplexity']:.1f} on {tokens}"
    torch = logits["torch"]
    if isinstance(torch, str):
        return f"{text}; torch {torch}"
    return (
        f"{text}; against torch: max error {torch['max_abs_error']:.1e} (largest logit "
        f"{logits['largest']:.1f}), KL {torch['kl']:.1e}, top-1 {torch['top1_agreement']:.1%}"
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BT, positions_BT, valid_BT):
    return decoder.apply({"params": params}, tokens_BT, positions_BT, valid_BT)[0][:_PROBES]


def _probes(folder: pathlib.Path, vocab_size: int) -> Probes:
    """Return built-in conversations, or random ids where there is no tokenizer or chat template."""
    shape = (_PROBES, _LENGTH)
    tokens_BT, valid_BT = np.zeros(shape, np.int32), np.ones(shape, bool)
    try:
        chat = Chat(folder, vocab_size)
    except NoChat as error:
        tokens_BT = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
        # A certificate is published: it names no folder.
        return Probes(tokens_BT, valid_BT, str(error).removeprefix(f"{folder}: "))
    for b, record in enumerate(load_records("ordinary", "builtin")[:_PROBES]):
        example = chat.encode(record.prompt, record.answer)
        ids = (*example.prompt_ids, *example.answer_ids)[:_LENGTH]
        tokens_BT[b, : len(ids)], valid_BT[b] = ids, np.arange(_LENGTH) < len(ids)
    return Probes(tokens_BT, valid_BT)


def _no_torch(parameters: int) -> str | None:
    """Say why torch cannot be the witness, or None if it can."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    need = 6 * parameters  # float32 weights, and half as much again while a file is read
    free = available_memory()
    if need > free:
        return f"it would need {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _torch_logits(folder: pathlib.Path, tokens_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """Return the float32 logits [N, V] of Hugging Face torch at the valid positions."""
    import torch

    AutoModelForCausalLM = libraries.transformers().AutoModelForCausalLM
    fix = "--certify=hashes (or --run.certify=hashes) leaves the comparison with it out."
    with reading(folder, "a model of transformers", fix):
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",
        ).eval()
    logits = []
    with torch.no_grad():
        for tokens_T, valid_T in zip(tokens_BT, valid_BT):
            ids = torch.tensor(tokens_T[valid_T][None]).long()
            logits.append(model(ids).logits[0].numpy())
    return np.concatenate(logits)


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V.astype(np.float64) - np.max(logits_V)
    return shifted_V - np.log(np.sum(np.exp(shifted_V)))


def _kl(reference_V: np.ndarray, other_V: np.ndarray) -> float:
    """Return KL(reference, other) in nats."""
    p_V, q_V = _log_softmax(reference_V), _log_softmax(other_V)
    return float(np.sum(np.exp(p_V) * (p_V - q_V)))
