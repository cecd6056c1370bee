"""Tokenizers that are not usable: each is told in one line with the way out."""

import importlib.util
import json
import shutil

import pytest

from safepatch_jax.data.tokenizer import NoChat, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def refusal(folder, rows=264):
    with pytest.raises(ValueError) as raised:
        load_tokenizer(folder, rows)
    message = str(raised.value)
    assert str(folder) in message and "\n" not in message and len(message) < 900
    return message


def add_token(folder, *tokens):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in tokens:
        entry = content["added_tokens"][-1]
        content["added_tokens"].append(entry | {"id": entry["id"] + 1, "content": token})
    path.write_text(json.dumps(content))


def test_added_tokens_without_rows_are_named(folder):
    add_token(folder, *(f"<tool{i}>" for i in range(259, 266)))
    message = refusal(folder)
    for part in (
        "the embedding has 264 rows, ids 0 to 263, and none for 2 added tokens",
        "'<tool264>' (id 264)",
        "'<tool265>' (id 265)",
        "resize_token_embeddings",
        "delete the tokens",
    ):
        assert part in message, message
    assert "and 4 more" in refusal(folder, 259) and len(load_tokenizer(folder, 266)) == 266
    add_token(folder, "\x1b[2J" + "y" * 10_000)
    assert "\x1b" not in refusal(folder)


def test_a_vocabulary_of_another_model(folder):
    assert "ids up to 258, the embedding only 100 rows" in refusal(folder, 100)


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\n", "tiktoken")]
)
def test_a_vocabulary_whose_reader_is_not_installed_names_it(folder, content, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    message = refusal(folder)
    assert f"pip install {package}" in message and "Copy tokenizer.json" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_git_lfs_pointers_are_named(folder, name):
    (folder / name).write_text(POINTER)
    message = refusal(folder)
    assert f"{name} is a Git LFS pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_file_is_named(folder, name):
    (folder / name).write_text('{"a": ')
    assert f"{name} cannot be read as JSON" in refusal(folder)


def test_no_tokenizer_at_all(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NoChat, match="no usable tokenizer .none of tokenizer.json"):
        load_tokenizer(folder, 264)
