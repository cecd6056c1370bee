"""Signed patches: what is trusted, what is refused, keys of every form."""

import json

import pytest

from safepatch_jax.registry import signing
from safepatch_jax.registry.changes import add, remove
from safepatch_jax.registry.commands import apply, listed, pull, show, verify
from safepatch_jax.registry.store import INDEX, MANIFEST, PATCHES, Store
from tests.patch_file.chains import assert_bits
from tests.registry.lines import without

pytest.importorskip("cryptography")


def key_pair(folder, name, form="pem", kind="ed25519"):
    """Files of a private and a public key, made without our code."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

    kinds = {"ed25519": ed25519.Ed25519PrivateKey, "x25519": x25519.X25519PrivateKey}
    key = kinds[kind].generate()
    forms = {
        "pem": (s.Encoding.PEM, s.PrivateFormat.PKCS8, s.PublicFormat.SubjectPublicKeyInfo),
        "ssh": (s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.PublicFormat.OpenSSH),
    }
    encoding, private, public = forms[form]
    path, public_path = folder / f"{name}.pem", folder / f"{name}.pub"
    path.write_bytes(key.private_bytes(encoding, private, s.NoEncryption()))
    encoding = s.Encoding.OpenSSH if form == "ssh" else encoding
    public_path.write_bytes(key.public_key().public_bytes(encoding, public))
    return path, public_path


@pytest.fixture
def keys(tmp_path):
    return key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")


@pytest.fixture
def signed(line, keys, tmp_path):
    """A registry whose patches a and b are signed by our key."""
    store = Store(str(tmp_path / "signed"))
    for name in "ab":
        add(store, str(line / f"{name}.patch"), name, key=signing.private_key(keys[0][0]))
    return store


def test_signed_patches_are_trusted_and_no_others(line, keys, signed, tmp_path):
    ours, theirs = (signing.public_key(str(public)) for _, public in keys)
    assert f"names the key {ours[:12]}, not checked" in listed(signed)[0]
    assert any(f"names the key {ours}, not checked" in x for x in show(signed, "a"))
    assert all(f"signed by {ours[:16]}" in x for x in verify(signed, trust=ours))
    apply(signed, "b", line / "start", tmp_path / "out", ours)
    assert_bits(tmp_path / "out", without(line, "c", "d"))
    add(signed, str(line / "c.patch"), "c")
    assert verify(signed)[2].endswith("not signed")
    for call in (
        lambda: apply(signed, "b", line / "start", tmp_path / "no", theirs),
        lambda: pull(signed, "b", tmp_path / "no", theirs),
        lambda: verify(signed, trust=theirs),
    ):
        with pytest.raises(ValueError, match=f"the key {ours[:16]}.*, not of {theirs[:16]}"):
            call()
    for call in (
        lambda: apply(signed, "c", line / "start", tmp_path / "no", ours),
        lambda: pull(signed, "c", tmp_path / "no", ours),
        lambda: verify(signed, trust=ours),
    ):
        with pytest.raises(ValueError, match="c@.* is not signed, and --trust asks for"):
            call()
    assert not (tmp_path / "no").exists()


def test_a_line_is_trusted_if_all_of_it_is_signed(line, keys, tmp_path):
    store, ours = Store(str(tmp_path / "mixed")), signing.public_key(str(keys[0][1]))
    add(store, str(line / "a.patch"), "a")
    add(store, str(line / "b.patch"), "b", key=signing.private_key(keys[0][0]))
    apply(store, "b", line / "a", tmp_path / "out", ours)  # the signed one alone
    with pytest.raises(ValueError, match="a@.* is not signed"):
        apply(store, "b", line / "start", tmp_path / "no", ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["manifest"].update(date="2020-01-01T00:00:00+00:00"),
        lambda entry: entry["manifest"].update(name="better"),
        lambda entry: entry["manifest"].update(more="new"),
        lambda entry: entry["signature"].update(value="0" * 128),
    ],
)
def test_a_changed_manifest_is_no_longer_signed(change, line, keys, signed, tmp_path):
    ours = signing.public_key(str(keys[0][1]))
    path = signed.folder / INDEX
    content = json.loads(path.read_text())
    digest, entry = list(content["patches"].items())[1]
    change(entry)
    path.write_text(json.dumps(content))
    (signed.folder / PATCHES / digest / MANIFEST).write_text(json.dumps(entry))
    for trust in ("", ours):
        with pytest.raises(ValueError, match="its signature is not that of its manifest"):
            verify(signed, f"@{digest}", trust)
    with pytest.raises(ValueError, match="its signature is not that of its manifest"):
        apply(signed, f"@{digest}", line / "a", tmp_path / "no", ours)


def test_what_is_signed_is_what_the_page_says(keys, signed):
    """So that others can check a signature without our code."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    entry = json.loads((signed.folder / INDEX).read_text())["patches"].popitem()[1]
    text = json.dumps(entry["manifest"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    public = load_pem_public_key(keys[0][1].read_bytes())
    value = bytes.fromhex(entry["signature"]["value"])
    public.verify(value, b"safepatch registry, manifest\n" + text.encode("ascii"))


def test_the_signature_beside_a_patch_is_the_one_of_the_index(signed, tmp_path):
    path = signed.folder / PATCHES / signed.read().find("a").hash / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"signature": None}))
    with pytest.raises(ValueError, match="patch.json says something else than index.json"):
        pull(signed, "a", tmp_path / "out")


def test_a_patch_that_is_there_is_signed_later(line, keys, signed):
    ours, theirs = (signing.private_key(private) for private, _ in keys)
    public = signing.public_key(str(keys[0][1]))
    add(signed, str(line / "c.patch"), "c")
    date = signed.read().find("c").manifest["date"]
    unsigned = (signed.folder / INDEX).read_bytes()
    add(signed, str(line / "c.patch"), "c", key=ours)
    (signed.folder / INDEX).write_bytes(unsigned)  # as a killed command leaves it
    assert verify(signed)[2].endswith("not signed")
    add(signed, str(line / "c.patch"), "c", key=ours)
    assert len(verify(signed, trust=public)) == 3
    assert signed.read().find("c").manifest["date"] == date
    before = (signed.folder / INDEX).read_bytes()
    for key in (None, ours):
        add(signed, str(line / "c.patch"), "c", key=key)
    with pytest.raises(ValueError, match=f"c@.* names the key {public[:16]}.* not signed anew"):
        add(signed, str(line / "c.patch"), "c", key=theirs)
    assert (signed.folder / INDEX).read_bytes() == before


def test_what_was_written_anew_without_signature_is_signed_later(line, keys, store):
    remove(store, "b", line / "start")
    entry, path = store.read().find("c"), store.folder / INDEX
    right, content = path.read_bytes(), json.loads(path.read_bytes())
    content["patches"][entry.hash]["manifest"]["rebased"]["without"] = entry.before
    path.write_text(json.dumps(content))
    key = signing.private_key(keys[0][0])
    with pytest.raises(ValueError, match="c@.* another rebased than its patch file says"):
        add(store, str(store.patch(entry)), "c", key=key)
    path.write_bytes(right)
    add(store, str(store.patch(entry)), "c", key=key)
    assert len(verify(store, "c", signing.public_key(str(keys[0][1])))) == 1


@pytest.mark.parametrize(
    "field, value", [("before", "0" * 64), ("kind", "scaled"), ("more", "signed by all")]
)
def test_a_record_that_says_something_else_than_its_patch_is_not_signed(
    field, value, line, keys, store
):
    path = store.folder / INDEX
    content = json.loads(path.read_text())
    content["patches"][store.read().find("a").hash]["manifest"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"a@.* another {field} than its patch file says"):
        add(store, str(line / "a.patch"), "a", key=signing.private_key(keys[0][0]))


def test_what_is_written_anew_is_signed_again_by_the_key_that_had_signed_it(line, keys, signed):
    key, ours = signing.private_key(keys[0][0]), signing.public_key(str(keys[0][1]))
    add(signed, str(line / "c.patch"), "c", key=key)
    before = (signed.folder / INDEX).read_bytes()
    with pytest.raises(ValueError, match="c@.* without a signature. Nothing .* --sign=KEYFILE"):
        remove(signed, "b", line / "start")
    assert (signed.folder / INDEX).read_bytes() == before
    text = remove(signed, "b", line / "start", key=key)
    assert len(text) == 2 and len(verify(signed, "c", ours)) == 1


def test_what_others_have_signed_or_nobody_is_written_anew_without_signature(line, keys, signed):
    """The key of --sign does not vouch for what it had not signed, nor for changed records."""
    ours, theirs = (signing.private_key(private) for private, _ in keys)
    add(signed, str(line / "c.patch"), "c", key=theirs)
    add(signed, str(line / "d.patch"), "d", key=ours)
    text = remove(signed, "b", line / "start", key=ours)
    assert len(text) == 4 and "c@" in text[2] and "has not signed all" in text[2]
    index = signed.read()
    assert index.find("c").signature is None and index.find("d").signature
    with pytest.raises(ValueError, match="d@.* without a signature"):
        remove(signed, "c", line / "start")
    path = signed.folder / INDEX
    content = json.loads(path.read_text())
    content["patches"][index.find("d").hash]["manifest"]["date"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(content))
    remove(signed, "c", line / "start", key=ours)
    assert signed.read().find("d").signature is None


@pytest.mark.parametrize("first", [0, 1])
def test_what_follows_from_another_patch_too_is_signed_if_that_is(first, line, keys, tmp_path):
    """d shares an entry with a."""
    store, ours = Store(str(tmp_path / "shared")), signing.private_key(keys[0][0])
    add(store, str(line / "a.patch"), "a", key=signing.private_key(keys[first][0]))
    for name in "bcd":
        add(store, str(line / f"{name}.patch"), name, key=ours)
    remove(store, "a", line / "start", "change", key=ours)
    assert (store.read().find("d").signature is None) == bool(first)


def test_keys_of_openssh_and_hex_digits(line, tmp_path):
    private, public = key_pair(tmp_path, "ssh", "ssh")
    store = Store(str(tmp_path / "ssh-registry"))
    add(store, str(line / "a.patch"), "a", key=signing.private_key(private))
    trust = signing.public_key(str(public))
    assert verify(store, trust=signing.public_key(trust.upper()))


def test_what_is_no_key_is_refused(keys, tmp_path):
    (tmp_path / "text").write_text("no key")
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    for path in (tmp_path / "text", keys[0][1]):
        with pytest.raises(ValueError, match="cannot be read as a private key .* openssl genpkey"):
            signing.private_key(path)
    private, public = key_pair(tmp_path, "exchange", kind="x25519")
    for read, path in ((signing.private_key, private), (signing.public_key, str(public))):
        with pytest.raises(ValueError, match="key of another kind than ed25519"):
            read(path)
    with pytest.raises(ValueError, match="cannot be read as a public key"):
        signing.public_key(str(keys[0][0]))
    with pytest.raises(ValueError, match="is larger than any key"):
        signing.public_key(str(tmp_path / "large"))
    with pytest.raises(ValueError, match="cannot be read as a key"):
        signing.public_key(str(tmp_path / "nothing"))


def test_without_the_package_the_line_says_what_to_install(keys, signed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    for call in (lambda: signing.private_key(keys[0][0]), lambda: verify(signed)):
        with pytest.raises(ValueError, match="Signatures .*pip install 'cryptography'"):
            call()
