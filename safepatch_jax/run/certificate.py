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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Chat, NoChat
from safepatch_jax.data.records import load_records
from safepatch_jax.io.companions import COMPANIONS
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.hf import check_keys, load_params
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.training.step import put_batch

FILE = "certificate.json"
LIMIT = 1e-4  # of the largest logit; float32 against float32 differs by 1e-6 to 1e-5
_PROBES, _LENGTH = 4, 48


@dataclasses.dataclass(frozen=True)
class Probes:
    """Tokens on which a model is run, which of them are real, and why they are no text, if so."""

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
) -> dict[str, Any]:
    """Examine a model folder in Hugging Face format as it lies on disk.

    Args:
      folder: the folder that was read (import) or written (export).
      sharder: the mesh on which our decoder runs.
      logits: also run the model; otherwise names, shapes and hashes alone.
      kind: 'import' or 'export'.
      before: SHA-256 by tensor of the model that this one was made from; says which tensors
        changed.

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
    hashes = processes.on_first(lambda: tensor_hashes(checkpoint.tensors))
    certificate = {
        "format": 1,
        "kind": kind,
        "architecture": dataclasses.asdict(config),
        "parameters": param_table(config).size,
        "keys": account,
        "tensors": {
            name: {"dtype": x.dtype, "shape": list(x.shape), "sha256": hashes[name]}
            for name, x in checkpoint.tensors.items()
        },
        "companions": {
            name: files.file_sha256(folder / name)
            for name in COMPANIONS
            if (folder / name).is_file()
        },
    }
    if before is not None:
        changed = [name for name, digest in hashes.items() if before.get(name) != digest]
        certificate["unchanged"], certificate["changed"] = len(hashes) - len(changed), changed
    probes = _probes(
        folder, config.vocab_size
    )  # also where they are not run: finds a tokenizer of another model
    certificate["tokenizer"] = "fits the embedding" if probes.trouble is None else probes.trouble
    certificate["logits"] = (
        check_logits(folder, sharder, probes) if logits else {"skipped": "not asked for"}
    )
    return certificate | {"versions": versions()}


def recorded_hashes(folder: pathlib.Path) -> dict[str, str] | None:
    """Return the SHA-256 of each tensor from a folder's certificate, or None if it has none (it was
    deleted)."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return {name: x["sha256"] for name, x in files.read_json(path)["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); delete it to go on without it."
        ) from error


def check_logits(folder: pathlib.Path, sharder: Sharder, probes: Probes) -> dict[str, Any]:
    """Run a folder's model in float32 on a few probe texts, here and in torch if it is there;
    errors as `certify`."""
    config, params = load_params(folder, sharder)
    tokens_BT, valid_BT = probes.tokens_BT, probes.valid_BT
    decoder = Decoder(config, jnp.float32, sharder)
    rows = (
        -(-_PROBES // sharder.batch_ways) * sharder.batch_ways
    )  # the batch must divide by the mesh
    full = {
        name: np.resize(x, (rows, _LENGTH))
        for name, x in (("tokens", tokens_BT), ("valid", valid_BT))
    }
    batch, positions_BT = (
        put_batch(full, sharder),
        np.broadcast_to(np.arange(_LENGTH), (rows, _LENGTH)),
    )
    with jax.default_matmul_precision("highest"):
        ours = processes.fetch(
            _forward(decoder, params, batch["tokens"], positions_BT, batch["valid"])
        )[valid_BT]
    del params
    if not np.all(np.isfinite(ours)):
        raise ValueError(
            f"{folder}: the logits are not finite. The weights hold NaN or overflow; check where "
            "they come from."
        )
    targets = np.where(valid_BT[:, 1:], tokens_BT[:, 1:], -1)
    follows = np.concatenate([targets, np.full((len(targets), 1), -1)], axis=1)[valid_BT]
    nll = [-_log_softmax(x)[t] for x, t in zip(ours, follows) if t >= 0]
    result: dict[str, Any] = {
        "probes": "text" if probes.trouble is None else "random",
        "tokens": int(valid_BT.sum()),
        "finite": True,
        "perplexity": math.exp(min(np.mean(nll), 700.0)),
        "largest": float(np.max(np.abs(ours))),
    }
    return result | {
        "torch": processes.on_first(
            lambda: _compare(folder, param_table(config).size, probes, ours)
        )
    }


def _compare(
    folder: pathlib.Path, parameters: int, probes: Probes, ours: np.ndarray
) -> dict[str, float] | str:
    """Compare logits with those of Hugging Face torch, or say why that cannot be done; errors as
    `certify`."""
    if why_not := _no_torch(parameters):
        return f"not compared: {why_not}"
    theirs = _torch_logits(folder, probes.tokens_BT, probes.valid_BT)
    result = {
        "max_abs_error": float(np.max(np.abs(ours - theirs))),
        "kl": float(np.mean([_kl(a, b) for a, b in zip(theirs, ours)])),
        "top1_agreement": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
    }
    if not result["max_abs_error"] <= LIMIT * np.max(np.abs(theirs)):
        raise ValueError(
            f"{folder}: our logits differ from those of Hugging Face torch by "
            f"{result['max_abs_error']:.3g} "
            f"(largest logit {np.max(np.abs(theirs)):.3g}), far more than float32 rounding. "
            "Please report this with "
            "the model's config.json; --certify=hashes (or --run.certify=hashes) goes on without "
            "the comparison."
        )
    return result


def summary(certificate: Mapping[str, Any]) -> str:
    """Say in one line what a certificate holds."""
    keys, logits = certificate["keys"], certificate["logits"]
    text = f"{keys['matched']} of {keys['tensors']} tensors matched"
    if keys["left_out"]:
        text += f" ({', '.join(keys['left_out'])} left out)"
    if "changed" in certificate:
        text += (
            f", {len(certificate['changed'])} changed, {certificate['unchanged']} bitwise as before"
        )
    if "skipped" in logits:
        return text
    text += (
        f"; perplexity {logits['perplexity']:.1f} on {logits['tokens']} {logits['probes']} tokens"
    )
    if isinstance(logits["torch"], str):
        return text + f"; torch {logits['torch']}"
    torch = logits["torch"]
    return text + (
        f"; against torch: max error {torch['max_abs_error']:.1e} (largest logit "
        f"{logits['largest']:.1f}), KL "
        f"{torch['kl']:.1e}, top-1 {torch['top1_agreement']:.1%}"
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BT, positions_BT, valid_BT):
    return decoder.apply({"params": params}, tokens_BT, positions_BT, valid_BT)[0][:_PROBES]


def _probes(folder: pathlib.Path, vocab_size: int) -> Probes:
    """Return built-in conversations, or random ids where there is no tokenizer or chat template."""
    tokens_BT, valid_BT = np.zeros((_PROBES, _LENGTH), np.int32), np.ones((_PROBES, _LENGTH), bool)
    try:
        chat = Chat(folder, vocab_size)
    except NoChat as error:
        return Probes(
            np.random.default_rng(0).integers(0, vocab_size, tokens_BT.shape, np.int32),
            valid_BT,
            str(error),
        )
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
    free = _available_memory()
    if free is not None and need > free:
        return f"it would need {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _available_memory() -> int | None:
    """Return the bytes that are free on this machine and within its container's limit, or None
    where nobody says."""
    free = []
    if (path := pathlib.Path("/proc/meminfo")).is_file():
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        free += [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    limit, used = (
        pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current")
    )
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return min(free, default=None)


def _torch_logits(folder: pathlib.Path, tokens_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """Return the float32 logits [N, V] of Hugging Face torch at the valid positions."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        attn_implementation="eager",
    ).eval()
    with torch.no_grad():
        return np.concatenate(
            [
                model(torch.tensor(tokens[valid][None]).long()).logits[0].numpy()
                for tokens, valid in zip(tokens_BT, valid_BT)
            ]
        )


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V.astype(np.float64) - np.max(logits_V)
    return shifted_V - np.log(np.sum(np.exp(shifted_V)))


def _kl(reference_V: np.ndarray, other_V: np.ndarray) -> float:
    """Return KL(reference, other) in nats."""
    p_V, q_V = _log_softmax(reference_V), _log_softmax(other_V)
    return float(np.sum(np.exp(p_V) * (p_V - q_V)))
