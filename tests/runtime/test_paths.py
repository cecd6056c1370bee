"""How paths are read, wherever a user gives one."""

import pathlib

import pytest

from safepatch_jax.runtime import paths
from safepatch_jax.settings import Settings


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "given, read", [("~/a", "{home}/a"), ("~", "{home}"), ("a/", "a"), ("./a//b/", "a/b")]
)
def test_a_path(given, read, home):
    assert paths.plain(given) == read.format(home=home)
    assert paths.resolve(given) == pathlib.Path(read.format(home=home)).absolute()


@pytest.mark.parametrize(
    "given, message",
    [
        ("gs:/bucket/run", "gs:// is not supported"),
        ("s3://bucket/../c", "Give the address without it"),
        ("gs://", "names no bucket"),
        ("file:///tmp/x", "file:// is not supported"),
        ("", "path is empty"),
        ("  ", "path is empty"),
        ("a\0b", "NUL"),
        ("~nobody-of-that-name/x", "Give the whole path"),
    ],
)
def test_what_is_no_path(given, message):
    with pytest.raises(ValueError, match=message):
        paths.plain(given)


@pytest.mark.parametrize(
    "read, given, wanted",
    [
        (paths.model, "hf:~/m/", "hf:{home}/m"),
        (paths.model, "gguf:~/m.gguf", "gguf:{home}/m.gguf"),
        (paths.model, "smollm2", "smollm2"),
        (paths.data, "~/d.csv?prompt=a/b&answer=c", "{home}/d.csv?prompt=a/b&answer=c"),
        (paths.data, "set:advbench@train", "set:advbench@train"),
        (paths.data, "builtin", "builtin"),
        (paths.suite, "quick+~/mine.json", "quick+{home}/mine.json"),
        (paths.judge, "classifier:~/j?label=a", "classifier:{home}/j?label=a"),
        (paths.judge, "endpoint:https://host/v1?model=m", "endpoint:https://host/v1?model=m"),
        (paths.judge, "phrases", "phrases"),
    ],
)
def test_texts_that_hold_a_path(read, given, wanted, home):
    assert read(given) == wanted.format(home=home)


@pytest.mark.parametrize("read", [paths.plain, paths.model, paths.data, paths.suite])
def test_the_address_of_a_bucket_stays_one_and_other_addresses_are_refused(read):
    assert read("gs://bucket//x.json") == "gs://bucket/x.json"
    with pytest.raises(ValueError, match="http:// is not supported"):
        read("http://bucket/x.json")
    with pytest.raises(ValueError, match="must be a local path"):
        paths.on_disk("gs://bucket/x.json")


def test_every_setting_that_is_a_path_is_read_so(home):
    names = ("model.source", "model.architecture", "data.harmful", "data.lookalike")
    names += ("data.ordinary", "data.manual_dir", "run.cache_dir")
    flat = Settings().override(dict.fromkeys(names, "~/x/")).flat()
    assert {flat[name] for name in names} == {f"{home}/x"}
    for name in names:
        with pytest.raises(ValueError, match=f"'{name}': .*ftp:// is not supported"):
            Settings().override({name: "ftp://bucket/x"})
