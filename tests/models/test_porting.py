"""docs/porting.md: the entry it shows adds a family."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from safepatch_jax.io.folder import stored_dtypes
from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.families import FAMILIES, Family
from safepatch_jax.testing import write_tiny_model

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "porting.md"
TOKENS = np.random.default_rng(0).integers(0, 264, (2, 16))


@pytest.fixture
def family(monkeypatch):
    """The name of the page's family, registered for one test."""
    (entry,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    ((name, family),) = eval(f"{{{entry}}}", {"Family": Family}).items()
    assert name not in FAMILIES
    monkeypatch.setitem(FAMILIES, name, family)
    return name


def test_the_documented_family(family, tmp_path, sharder):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    start = write_tiny_model(
        tmp_path / "start", model_type=family, head_dim=8, tie_word_embeddings=False
    )
    reference = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    assert type(reference).__name__ == FAMILIES[family].architecture
    with torch.no_grad():  # biases and norms start as constants, which would hide a mistake
        for x in reference.parameters():
            x.add_(0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    reference.save_pretrained(tmp_path / "theirs")
    config, params = load_params(tmp_path / "theirs", sharder)
    theirs_BTV = reference.eval()(torch.tensor(TOKENS)).logits.detach().numpy()
    positions_BT = np.arange(16)[None].repeat(2, 0)
    ours_BTV, _ = jax.jit(Decoder(config, jnp.float32, None).apply)(
        {"params": params}, TOKENS, positions_BT, np.ones((2, 16), bool)
    )
    assert np.max(np.abs(ours_BTV - theirs_BTV)) <= 1e-5 * np.max(np.abs(theirs_BTV))
    stored = stored_dtypes(tmp_path / "theirs")
    save_model(tmp_path / "ours", params, config, tmp_path / "theirs", stored=stored)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].tobytes() == x.tobytes(), name
