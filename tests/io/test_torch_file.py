"""torch's zip files: what torch wrote is found to the bit; what is no list of tensors is refused
and never executed."""

import collections
import copyreg
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest

from safepatch_jax.io.torch_file import list_tensors

V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = np.arange(6, dtype=np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def sizes(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape=(2, 3), strides=(3, 1), offset=0, key="0", kind="FloatStorage", count=6, rest=b""
) -> bytes:
    """Opcodes that push one tensor, as torch.save writes them."""
    storage = (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )
    return (
        V2
        + b"("
        + storage
        + number(offset)
        + sizes(shape)
        + sizes(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
        + rest
        + b"tR"
    )


def listing(**items: bytes) -> bytes:
    """A protocol 2 pickle of a dictionary whose values are given as opcodes."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


def write(
    path, data_pkl: bytes, entries={"data/0": FLOATS.tobytes()}, compression=zipfile.ZIP_STORED
):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.bin"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the reference is torch: pip install torch")


def assert_equal_to_torch(path, torch):
    ours, theirs = (
        list_tensors(path),
        torch.load(path, weights_only=False),
    )  # written here; protocol 4 needs it
    assert list(ours) == list(theirs)
    for name, x in theirs.items():
        stored = ours[name]
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(x.shape), str(x.dtype))
        assert stored.size == x.numel() * x.element_size()
        with open(path, "rb") as f:
            f.seek(stored.offset)
            raw = f.read(stored.size)
        assert raw == x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
        if stored.dtype in ("float32", "bfloat16", "float16"):
            assert stored.read().tobytes() == raw


def test_written_by_hand(file):
    write(
        file,
        listing(
            a=tensor(),
            b=tensor((2,), (1,), offset=3),
            c=tensor((), (), offset=5),
            e=tensor((0, 4), (9, 9)),
        ),
        {"data/0": FLOATS.tobytes(), "byteorder": b"little", "version": b"3\n"},
    )
    found = list_tensors(file)
    assert {name: x.read().tolist() for name, x in found.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [3, 4],
        "c": 5,
        "e": [],
    }
    assert {(x.path, x.dtype) for x in found.values()} == {(file, "float32")}


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equals_torch(file, torch, kind, protocol):
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    state = kind(
        f32=base,
        bf16=torch.randn(3, 5).bfloat16(),
        f16=torch.randn(2, 3, 4).half(),
        same=base,
        flat=base.view(24),
        rows=base[2:5],
        row=base[3],
        element=base[1, 2],
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 3),
        ones=base[:, :1].contiguous(),
        size1=base[1:2, :].expand(1, 4),
        parameter=torch.nn.Parameter(torch.randn(7)),
        frozen=torch.nn.Parameter(torch.randn(2).half(), requires_grad=False),
    )
    torch.save(state, file, pickle_protocol=protocol)
    assert_equal_to_torch(file, torch)


def test_equals_torch_on_modules_and_other_dtypes(file, torch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), file)  # with the versions of the modules as an attribute
    assert_equal_to_torch(file, torch)
    assert list_tensors(file)["1.num_batches_tracked"].dtype == "int64"
    names = (
        "float64 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 complex64 complex128 "
        "float8_e4m3fn float8_e5m2 "
        "float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
    torch.save({name: torch.ones(3, dtype=getattr(torch, name)) for name in names}, file)
    assert_equal_to_torch(file, torch)
    module = torch.nn.Linear(2, 2)
    module.half().requires_grad_(False)
    torch.save(dict(module.named_parameters()), file)
    assert_equal_to_torch(file, torch)


def test_torch_reads_what_is_written_by_hand(file, torch):
    write(
        file,
        listing(a=tensor(), b=tensor((2,), (1,), offset=3)),
        {"data/0": FLOATS.tobytes(), "version": b"3\n"},
    )
    assert_equal_to_torch(file, torch)


def test_tied_weights_lie_at_one_place(file, torch):
    x = torch.randn(3, 2)
    torch.save({"a": x, "b": x, "c": x[1:]}, file)
    a, b, c = list_tensors(file).values()
    assert (a.offset, a.size) == (b.offset, b.size) and c.offset == a.offset + 8


class Payload:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker) -> dict[str, bytes]:
    """Pickles that, given to an unpickler, run a command which leaves a file."""
    command = f"echo executed > {marker}"
    opened = f"__import__('os').system({command!r})"
    os_system = b"cposix\nsystem\n"
    arguments = b"(" + text(command) + b"t"
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()
    return {
        "GLOBAL + REDUCE": b"\x80\x02" + os_system + arguments + b"R.",
        "inside a state dict": listing(a=tensor(), b=os_system + arguments + b"R"),
        "in a tensor's hooks": listing(a=tensor(rest=os_system + arguments + b"R")),
        "as a persistent id": b"\x80\x02" + os_system + arguments + b"RQ.",
        "builtins.eval": b"\x80\x02cbuiltins\neval\n(" + text(opened) + b"tR.",
        "python 2 name": b"\x80\x02c__builtin__\neval\n(" + text(opened) + b"tR.",
        "STACK_GLOBAL": b"\x80\x04"
        + short("posix")
        + short("system")
        + b"\x93"
        + arguments
        + b"R.",
        "dotted STACK_GLOBAL": b"\x80\x04"
        + short("torch")
        + short("os.system")
        + b"\x93"
        + arguments
        + b"R.",
        "STACK_GLOBAL of no strings": b"\x80\x04"
        + number(1)
        + number(2)
        + b"\x93"
        + arguments
        + b"R.",
        "INST": b"(" + text(command) + b"iposix\nsystem\n.",
        "INST of an allowed name": b"(icollections\nOrderedDict\n.",
        "OBJ": b"(" + os_system + text(command) + b"o.",
        "OBJ of an allowed name": b"(ccollections\nOrderedDict\no.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + text(command) + b"t\x81.",
        "NEWOBJ of an allowed name": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04" + short("subprocess") + short("Popen") + b"\x93)}\x92.",
        "BUILD on a name": b"\x80\x02" + V2 + b"}" + text("__call__") + os_system + b"sb.",
        "BUILD with slots": b"\x80\x02" + V2 + b"N}" + text("__class__") + V2 + b"s\x86b.",
        "BUILD on a tensor": listing(
            a=tensor() + b"}" + text("path") + text("/etc/passwd") + b"sb"
        ),
        "EXT1": b"\x80\x02\x82\xf0" + arguments + b"R.",
        "EXT2": b"\x80\x02\x83\xf0\xf0" + arguments + b"R.",
        "EXT4": b"\x80\x02\x84\xf0\xf0\xf0\x00" + arguments + b"R.",
        "PERSID": b"Pstorage\n.",
        "os.system by pickle": pickle.dumps(Payload(os.system, command)),
        "eval by pickle": pickle.dumps({"w": Payload(eval, opened)}, protocol=2),
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\nenviron\n" + text("clear") + b"tR)R.",
        "torch.load": b"\x80\x02ctorch\nload\n(" + text(str(marker)) + b"tR.",
        "torch.hub": b"\x80\x02ctorch.hub\nload\n(" + text("x") + text("y") + b"tR.",
        "torch.jit": b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n)R.",
        "calls a tensor": listing(a=tensor() + b")R"),
        "calls a storage": b"\x80\x02ctorch\nFloatStorage\n(" + number(9) + b"tR.",
        "calls text": b"\x80\x02" + text("posix.system") + arguments + b"R.",
        "OrderedDict of items": b"\x80\x02ccollections\nOrderedDict\n(" + text("x") + b"tR.",
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_attacks_are_refused_and_not_executed(file, tmp_path, name):
    marker = tmp_path / "marker"
    registered = {"EXT1": 0xF0, "EXT2": 0xF0F0, "EXT4": 0xF0F0F0}
    if name in registered:  # as if another library had registered the code
        copyreg.add_extension("posix", "system", registered[name])
    try:
        write(file, attacks(marker)[name])
        with pytest.raises(
            ValueError,
            match=r"refusing to load .*x\.bin: its pickle .*only tensors are read\. Convert",
        ):
            list_tensors(file)
    finally:
        if name in registered:
            copyreg.remove_extension("posix", "system", registered[name])
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["GLOBAL + REDUCE", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT4", "os.system by pickle"],
)
def test_the_attacks_are_real(tmp_path, name):
    """Python's own unpickler does execute them: the marker would show it."""
    marker = tmp_path / "marker"
    registered = {"EXT1": 0xF0, "EXT4": 0xF0F0F0}
    if name in registered:
        copyreg.add_extension("posix", "system", registered[name])
    try:
        pickle.loads(attacks(marker)[name])
    finally:
        if name in registered:
            copyreg.remove_extension("posix", "system", registered[name])
    assert marker.read_text() == "executed\n"


def test_the_error_names_what_the_pickle_asks_for(file):
    cases = {
        b"\x80\x02cposix\nsystem\n.": r"asks for 'posix\.system' \(GLOBAL\)",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.": r"asks for 'builtins\.eval' \(STACK_GLOBAL\)",
        b"(iposix\nsystem\n.": r"asks for 'posix\.system' \(INST\)",
        b"\x80\x02\x82\xf0.": "uses the opcode EXT1",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.": "uses the opcode NEWOBJ",
    }
    for data, message in cases.items():
        with pytest.raises(ValueError, match=f"refusing to load .*x\\.bin: its pickle {message}"):
            list_tensors(write(file, data))


def test_a_real_checkpoint_with_more_than_tensors(file, torch):
    torch.save(
        {"model": {"w": torch.zeros(2)}, "epoch": 3, "lr": 0.1, "args": [1, "x"], "none": None},
        file,
    )
    with pytest.raises(
        ValueError,
        match=r"x\.bin: 'model' is a value of type dict, not a tensor; 'epoch' is a value of type"
        r" int.*'none' is a value of type NoneType.*plain dictionary of contiguous tensors",
    ):
        list_tensors(file)
    torch.save(torch.zeros(2), file)
    with pytest.raises(ValueError, match="it holds a value of type Tensor, no dictionary"):
        list_tensors(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(
        ValueError, match=r"its pickle asks for 'torch\.nn\.modules\.linear\.Linear'"
    ):
        list_tensors(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, file)
    with pytest.raises(ValueError, match=r"asks for 'torch\._utils\._rebuild_qtensor'"):
        list_tensors(file)


def test_tensors_that_cannot_be_read_in_place(file, torch):
    x = torch.arange(6.0).reshape(2, 3)
    conjugate = lambda: torch.ones(2, dtype=torch.complex64).conj()
    torch.save(
        {
            "ok": x,
            "t": x.T,
            "columns": x[:, 1:],
            "wide": x[:1].expand(4, 3),
            "conj": conjugate(),
            "neg": conjugate().imag,
        },
        file,
    )
    with pytest.raises(ValueError) as error:
        list_tensors(file)
    for part in (
        "'t' is not contiguous (shape (3, 2), strides (1, 3))",
        "'columns' is not contiguous",
        "'wide' is not contiguous",
        "'conj' is conjugated or negated",
        "'neg' is not contiguous",
    ):
        assert part in str(error.value)
    assert "'ok'" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(offset=1),
            r"'w' reaches beyond its storage \(shape \(2, 3\) from element 1, 24 bytes\)",
        ),
        (dict(shape=(3, 3)), r"'w' reaches beyond its storage"),
        (dict(shape=(2**31 - 1,) * 40, strides=(1,) * 40), "'w' is not contiguous"),
        (dict(shape=(2**31 - 1,), strides=(1,)), "'w' reaches beyond its storage"),
        (dict(offset=7, shape=(0,), strides=(1,)), "'w' reaches beyond its storage"),
        (dict(count=7), "'w' has a storage of 7 x float32 in 24 bytes"),
        (dict(kind="HalfStorage"), "'w' has a storage of 6 x float16 in 24 bytes"),
        (dict(key="1"), "'w' has its values in storage '1', which the file lacks"),
        (dict(key="../data/0"), "which the file lacks"),
        (dict(key="../../../etc/passwd"), "which the file lacks"),
        (dict(strides=(1, 2)), r"'w' is not contiguous \(shape \(2, 3\), strides \(1, 2\)\)"),
        (dict(strides=(0, 0)), "'w' is not contiguous"),
        (dict(offset=-1), "whole numbers from 0 on"),
        (dict(shape=(-2, 3)), "whole numbers from 0 on"),
        (dict(strides=(-3, 1)), "whole numbers from 0 on"),
        (dict(shape=(6,)), "whole numbers from 0 on"),
        (dict(shape=(1,) * 65, strides=(1,) * 65), "whole numbers from 0 on"),
        (dict(count=-6), "a persistent id that is no storage"),
        (dict(kind="NoStorage"), r"asks for 'torch\.NoStorage'"),
        (dict(rest=b"}" + text("neg") + b"\x88s"), "'w' is conjugated or negated when used"),
    ],
)
def test_wrong_tensors(file, change, message):
    write(file, listing(w=tensor(**change)))
    with pytest.raises(ValueError, match=rf"x\.bin: .*{message}"):
        list_tensors(file)


def test_huge_numbers_are_refused(file):
    huge = b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000  # LONG4
    data = listing(w=tensor()).replace(sizes((2, 3)), b"(" + huge + number(3) + b"t")
    with pytest.raises(ValueError, match="whole numbers from 0 on"):
        list_tensors(write(file, data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
        b"\x80\x02}(X\x01\x00\x00\x00au.",
        b"\xff\xff\xff",
        b"\x80\x02s.",
        b"\x80\x02u.",
        b"\x80\x02Nb.",
        b"\x80\x02}Na.",
        b"\x80\x02K\x01K\x02K\x03s.",
        b"\x80\x02}NK\x03s.",
        b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f.",  # BINBYTES8 of 2^63 bytes
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x80\x02]" + b"2l" * 20 + b".",  # DUP
        b"\x80\x02c\xff\xfe\nx\n.",
        b"\x80\x02(.",
        b"\x80\x02(t(t\x86q\x00h\x00\x86.",
        b"\x80\x02q\x00.",
        b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x02)" + b"q\x00h\x00\x86" * 100 + b".",  # a tuple of 2^100 leaves
        b"\x80\x02})"
        + b"q\x00h\x00\x86" * 100
        + b"Ns.",  # the same as a key: its hash would take for ever
        listing(a=tensor(), b=tensor())[:-2] + text("a") + b"Nu.",  # a name twice
    ],
)
def test_damaged_and_absurd_pickles(file, data):
    with pytest.raises(ValueError, match=r"refusing to load .*x\.bin"):
        list_tensors(write(file, data))


def test_a_pickle_asks_for_no_memory(file):
    """LONG_BINPUT at a high place makes Python's own unpickler fill gigabytes."""
    data = b"\x80\x02}r\xff\xff\xff\xff" + text("w") + tensor() + b"s."
    assert list_tensors(write(file, data))["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_random_bytes_raise_nothing_but_value_errors(file):
    rng = np.random.default_rng(0)
    good = listing(a=tensor(), b=tensor((2,), (1,), offset=3))
    outcomes = set()
    for _ in range(400):
        data = bytearray(good)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            list_tensors(write(file, bytes(data)))
            outcomes.add("read")
        except ValueError as error:
            assert "x.bin" in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_damaged_zip_files_raise_nothing_but_value_errors(file):
    """Whatever is read lies inside the file."""
    good = write(
        file, listing(a=tensor()), {"data/0": FLOATS.tobytes(), "byteorder": b"little"}
    ).read_bytes()
    for size in range(len(good)):
        file.write_bytes(good[:size])
        with pytest.raises(
            ValueError,
            match=r"x\.bin (is no zip file|cannot be read as a zip file .*truncated or damaged)",
        ):
            list_tensors(file)
    rng = np.random.default_rng(0)
    for _ in range(600):
        data = bytearray(good)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            for x in list_tensors(file).values():
                assert 0 <= x.offset and x.offset + x.size <= len(data)
        except ValueError as error:
            assert "x.bin" in str(error)


def test_legacy_format(file, torch):
    torch.save({"w": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError,
        match=r"x\.bin is no zip file: .*before 1\.6.*torch\.load\(path, weights_only=True\)",
    ):
        list_tensors(file)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"<html>"]
)
def test_not_a_zip_file(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin is no zip file"):
        list_tensors(file)


def test_no_file(file):
    with pytest.raises(ValueError, match=r"x\.bin cannot be read .*No such file"):
        list_tensors(file)


def test_truncated_file_of_torch(file, torch):
    torch.save({"w": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"x\.bin cannot be read as a zip file .*truncated or damaged"
    ):
        list_tensors(file)


def test_compressed(file):
    write(file, listing(a=tensor()), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'archive/data\.pkl' is compressed or encrypted.*zip -0"):
        list_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", listing(a=tensor()))
        archive.writestr("archive/data/0", FLOATS.tobytes(), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'archive/data/0' is compressed or encrypted"):
        list_tensors(file)


def test_big_endian(file):
    write(file, listing(a=tensor()), {"data/0": FLOATS.tobytes(), "byteorder": b"big"})
    with pytest.raises(ValueError, match=r"byte order is b'big', only b'little' is read"):
        list_tensors(file)


def test_odd_archives(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../data.pkl", listing(a=tensor()))
        archive.writestr("../data/0", FLOATS.tobytes())
    assert list_tensors(file)["a"].read().tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]  # read in place, never unpacked
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", listing(a=tensor()))
        archive.writestr("b/data.pkl", listing(a=tensor()))
    with pytest.raises(ValueError, match=r"2 entries '\*/data\.pkl' where torch writes one"):
        list_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"0 entries '\*/data\.pkl'"):
        list_tensors(file)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", listing(a=tensor()))
        for _ in range(2):
            archive.writestr("a/data/0", FLOATS.tobytes())
    with pytest.raises(ValueError, match="two entries of the zip file have one name"):
        list_tensors(file)


def test_a_pickle_larger_than_any_list(file, monkeypatch):
    from safepatch_jax.io import torch_file

    monkeypatch.setattr(torch_file, "_MOST_PICKLE_BYTES", 100)
    with pytest.raises(ValueError, match=r"'archive/data\.pkl' has .* bytes, far more than a list"):
        list_tensors(write(file, listing(a=tensor())))


def test_torch_is_not_imported(file, tmp_path):
    import subprocess
    import sys

    write(file, listing(a=tensor()))
    code = (
        "import sys; from safepatch_jax.io.torch_file import list_tensors; "
        "list_tensors(sys.argv[1]); "
        "assert 'torch' not in sys.modules and 'posix.system' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
