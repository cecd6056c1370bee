"""launch.patch as a user calls it: each command once, and mistakes that end with one clear line."""

import functools

import pytest

from safepatch_jax.runtime.files import folder_hashes
from safepatch_jax.testing import write_tiny_model
from tests import calls
from tests.patch_file.models import assert_same, patched_copy

call = functools.partial(calls.call, "launch.patch")
done = functools.partial(calls.done, "launch.patch")


def test_all_commands(tmp_path):
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16", shard_bytes=20_000)
    model, start = patched_copy(base, tmp_path / "model"), folder_hashes(base)
    patch = f"--patch={tmp_path / 'x.patch'}"
    assert "an entry" in done("create", f"--base={base}", f"--model={model}", patch)
    assert "model.layers.1.mlp.up_proj.weight" in done("inspect", patch)
    assert f"{base} is the backbone" in done("verify", patch, f"--model={base}")
    done("apply", patch, f"--model={base}", f"--out={tmp_path / 'new'}")
    assert_same(tmp_path / "new", model)
    assert folder_hashes(base) == start
    (base / "certificate.json").write_text("{}")
    assert "14 tensors changed; removed certificate.json" in done("apply", patch, f"--model={base}")
    assert f"{base} is the patched model" in done("verify", patch, f"--model={base}")
    assert "0 tensors changed, 14 were so already" in done("apply", patch, f"--model={base}")
    done("revert", patch, f"--model={base}")
    assert folder_hashes(base) == start
    patched_copy(base, tmp_path / "other", seed=1)
    done(
        "create",
        f"--base={base}",
        f"--model={tmp_path / 'other'}",
        f"--patch={tmp_path / 'y.patch'}",
    )
    both = f"--patches={tmp_path / 'x.patch'},{tmp_path / 'y.patch'}"
    done("combine", both, f"--model={base}", f"--out={tmp_path / 'z.patch'}")
    done(
        "scale",
        f"--patch={tmp_path / 'z.patch'}",
        "--factor=-0.5",
        f"--model={base}",
        f"--out={tmp_path / 's.patch'}",
    )
    update = tmp_path / "weight_v000003"
    text = done("convert", patch, "--to=disk-delta", f"--model={base}", f"--out={update}")
    assert f"{update}: disk-delta, " in text
    again = tmp_path / "again.patch"
    given = f"--patch={update}", "--from=disk-delta", f"--model={base}", f"--out={again}"
    assert "an entry" in done("convert", *given)
    assert again.read_bytes() == (tmp_path / "x.patch").read_bytes()
    refused = call("apply", f"--patch={tmp_path / 'y.patch'}", f"--model={model}")
    assert refused.returncode == 2
    assert "14 of 20 tensors are neither as in the backbone" in refused.stderr
    refused = call("verify", f"--patch={tmp_path / 'y.patch'}", f"--model={model}")
    assert refused.returncode == 2
    assert "14 neither: model.layers.0.mlp.down_proj.weight" in refused.stderr
    for path in sorted(base.glob("*.safetensors"))[:2]:
        path.write_bytes((model / path.name).read_bytes())
    between = call("verify", patch, f"--model={base}")
    assert between.returncode == 2 and "is between the two" in between.stderr
    assert "apply finishes, revert undoes" in between.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (
            [],
            "one command is needed, none was given. There are create, inspect, verify, apply, "
            "revert, scale, combine, convert",
        ),
        (["apply", "--model=x", "--factor=2"], "apply needs --patch and does not take --factor"),
        (["convert", "--patch=x", "--model=y", "--out=z"], "takes one of --to and --from"),
        (["inspect", "--patch=/nowhere"], "No patch file '/nowhere'"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message):
    result = call(*args)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
