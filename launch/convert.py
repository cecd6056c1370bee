"""Convert a model between Hugging Face folders, GGUF files and orbax checkpoints, with a
certificate.

  python -m launch.convert --source=hf:DIR --target=orbax:DIR2
  python -m launch.convert --source=orbax:DIR2 --target=hf:DIR3 --mesh=data:1,fsdp:8,tensor:1
  python -m launch.convert --source=gguf:model.gguf --target=hf:DIR [--tokenizer=DIR4]
  python -m launch.convert --source=org/name@revision --target=hf:DIR6
  python -m launch.convert --source=hf:DIR --adapter=DIR6 --target=hf:DIR7
  python -m launch.convert --source=hf:DIR --target=hf:DIR5 --dtype=bfloat16 --rounding=stochastic

Hugging Face folders may hold safetensors or torch .bin files, in one file or many; .bin files need
torch, which reads the weights alone and runs no code in them. They are written as safetensors, bit
for bit what was read unless --dtype asks for another. Each device receives its own part; host
memory holds a tensor or two above that, or the largest stacked parameter where orbax reads or
writes.
TARGET/certificate.json accounts for every key, has each tensor's SHA-256, and compares logits with
Hugging Face torch where torch is installed and memory is free for its float32 copy
(--certify=hashes leaves that out).
"""

from absl import flags

from launch import distributed, kinds, main
from safepatch_jax.runtime.console import say

_SOURCE = kinds.model(
    "source",
    None,
    "hf:DIR, orbax:DIR, gguf:FILE, org/name[@revision] of the Hugging Face Hub, or smollm2.",
    required=True,
)
_TARGET = kinds.model(
    "target", None, "hf:DIR or orbax:DIR; must not exist or be empty.", required=True
)
_MESH = flags.DEFINE_string(
    "mesh", "data:1,fsdp:-1,tensor:1", "Devices per mesh axis; -1 once means 'all that are left'."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "keep", ["keep", "float32", "bfloat16", "float16"], "Storage dtype in a target hf:DIR."
)
_ROUNDING = flags.DEFINE_enum(
    "rounding", "nearest", ["nearest", "stochastic"], "How --dtype rounds."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of stochastic rounding.", lower_bound=0)
_SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes",
    5_000_000_000,
    "Weight files are cut at this size (target hf:DIR).",
    lower_bound=1024,
)
_TOKENIZER = kinds.path("tokenizer", None, "Folder whose tokenizer files go with a GGUF file.")
_ADAPTER = kinds.path(
    "adapter", None, "Folder of a LoRA adapter (PEFT) that is merged into a source hf:DIR."
)
_CERTIFY = flags.DEFINE_enum(
    "certify", "logits", ["logits", "hashes"], "Compare logits too, or hashes alone."
)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    from safepatch_jax.run.convert import convert  # here: --help does not need JAX

    certificate = convert(
        _SOURCE.value,
        _TARGET.value,
        mesh=_MESH.value,
        dtype=_DTYPE.value,
        rounding=_ROUNDING.value,
        seed=_SEED.value,
        shard_bytes=_SHARD_BYTES.value,
        tokenizer=_TOKENIZER.value,
        adapter=_ADAPTER.value,
        certify=_CERTIFY.value,
    )
    say(f"Certificate: {certificate}")


if __name__ == "__main__":
    main.run(run)
