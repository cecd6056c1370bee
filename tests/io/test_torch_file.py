"""torch's weight files: what torch wrote is read to the bit; what is no list of tensors is refused,
and code in it is never run."""

import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from safepatch_jax.io.torch_file import list_tensors

LOADS = (
    "import sys; from safepatch_jax.io.torch_file import list_tensors; list_tensors(sys.argv[1])"
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.bin"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch reads its files: pip install torch")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_equals_torch(file, torch, zipped):
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    state = {
        "float32": base,
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(2, 3, 4).half(),
        "nan": torch.tensor([0x7FC1, -63, 1], dtype=torch.int16).view(torch.bfloat16),
        "rows": base[2:5],
        "element": base[1, 2],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "transposed": base.T,
        "columns": base[:, 1:3],
        "expanded": base[:1].expand(4, 4),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    tensors = list_tensors(file)
    assert list(tensors) == list(state)
    for name, expected in state.items():
        x, values = tensors[name], expected.detach().resolve_neg().contiguous()
        raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (x.path, x.shape) == (file, tuple(expected.shape)), name
        assert (f"torch.{x.dtype}", x.size) == (str(expected.dtype), len(raw)), name
        assert x.read().tobytes() == raw, name
        assert str(x.read().dtype) == x.dtype


def test_runs_and_boxes(file, torch):
    torch.save(
        {"w": torch.arange(24.0).reshape(6, 4), "t": torch.arange(24.0).reshape(4, 6).T}, file
    )
    tensors = list_tensors(file)
    for name, whole in (
        ("w", np.arange(24.0).reshape(6, 4)),
        ("t", np.arange(24.0).reshape(4, 6).T),
    ):
        run = np.empty((2, 4), np.float32)
        assert tensors[name].read(run, 8) is run
        np.testing.assert_array_equal(run, whole[2:4])
        box = tensors[name].read_box((slice(1, 2), slice(0, 3), slice(2, 4)), (2, 3, 4))
        np.testing.assert_array_equal(box, whole.reshape(2, 3, 4)[1:2, :, 2:4])
        assert box.base is None  # holds no map of the file


def test_only_what_is_asked_for_is_loaded(file, torch):
    """A file of 400 MB is listed, and a row of it read, in much less memory."""
    torch.save({"w": torch.zeros(100_000, 1000)}, file)
    code = (
        LOADS + "['w'].read(__import__('numpy').empty(1000, 'float32'), 5000)\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    small = file.with_name("small.bin")
    torch.save({"w": torch.zeros(10, 1000)}, small)
    peaks = []
    for path in (small, file):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, text=True, capture_output=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 100_000  # kB


class Payload:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_hostile(torch, path, value, form):
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif form == "zip by hand":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "torch zip")


@pytest.mark.parametrize("form", ["torch zip", "torch before 1.6", "bare pickle", "zip by hand"])
@pytest.mark.parametrize("function", [os.system, eval])
def test_code_is_never_run(file, tmp_path, torch, form, function):
    marker = tmp_path / "marker"
    command = f"echo executed > {marker}"
    argument = f"__import__('os').system({command!r})" if function is eval else command
    write_hostile(torch, file, {"w": Payload(function, argument)}, form)
    with pytest.raises(
        ValueError, match=r"x\.bin cannot be read as weights alone by torch: .*never run.*convert"
    ):
        list_tensors(file)
    assert not marker.exists()
    if form == "bare pickle":  # the attack is real: Python's own unpickler does run it
        pickle.loads(file.read_bytes())
        assert marker.exists()


def test_more_than_tensors(file, torch):
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 3, 5: torch.zeros(2)}, file)
    with pytest.raises(
        ValueError,
        match=r"x\.bin: 'model' is a value of type dict, not a dense tensor; 'epoch' is a value of "
        r"type int.*; 5 is .*Save the model's state_dict, or convert",
    ):
        list_tensors(file)
    torch.save({"sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2, device="meta")}, file)
    with pytest.raises(ValueError, match="'sparse' is .*not a dense tensor; 'meta' is"):
        list_tensors(file)
    torch.save(torch.zeros(2), file)
    with pytest.raises(ValueError, match="holds a value of type Tensor. Expected: a dictionary"):
        list_tensors(file)
    torch.save({"module": torch.nn.Linear(2, 2)}, file)
    with pytest.raises(ValueError, match=r"Unsupported global: GLOBAL torch\.nn\.modules\.linear"):
        list_tensors(file)


def test_damaged_files_raise_nothing_but_value_errors(file, torch):
    torch.save({"w": torch.arange(40.0)}, file)
    good = file.read_bytes()
    for content in (b"", b"PK", b"<html>", *(good[:size] for size in range(8, len(good), 97))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.bin cannot be read .*truncated, damaged"):
            list_tensors(file)
    file.unlink()
    with pytest.raises(ValueError, match=r"x\.bin cannot be read .*No such file"):
        list_tensors(file)


def test_torch_is_optional_and_a_safe_one_is_needed(file, monkeypatch):
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ValueError,
        match=r"x\.bin holds torch weights, and torch is not installed\. Install it .*, or convert"
        r" the folder to safetensors once.*launch\.convert --source=hf:DIR --target=hf:DIR2",
    ):
        list_tensors(file)
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setattr(sys.modules["torch"], "__version__", "2.9.1+cpu", raising=False)
    with pytest.raises(ValueError, match=r"torch 2\.9\.1\+cpu does not .* Install torch 2\.10 or"):
        list_tensors(file)
