"""Buckets: publication without renaming, leases, refusals, faults, processes without a common
folder."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from safepatch_jax.runtime import addresses, files, holding, lease, mirror, objects, paths
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.runtime.workspace import Workspace, locked
from safepatch_jax.testing import write_tiny_model
from tests import bucket as buckets
from tests.calls import ROOT
from tests.launch.test_processes import free_port

pytestmark = buckets.needed


@pytest.fixture
def place(bucket_server, request):
    """An address of the test's own, and the local folder that stands for it."""
    address = f"gs://bucket/{request.node.name.replace('[', '-').replace(']', '')}"
    return address, paths.resolve(address)


def fill(folder, **contents):
    with files.new_folder(folder) as out:
        for name, content in contents.items():
            (out / name).write_text(content)


def one_line(info):
    text = str(info.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def test_a_folder_is_published_with_its_list_last_and_read_by_it(place):
    address, folder = place
    fill(folder, a="one", b="two")
    sizes = Objects(address).sizes()
    assert sizes.keys() == {"a", "b", mirror.LIST} and sizes["a"] == 3
    shutil.rmtree(folder)
    read = paths.readable(address)
    assert sorted(os.listdir(read)) == ["a", "b"] and (folder / "b").read_text() == "two"
    with pytest.raises(ValueError, match="exists and is not empty") as info:
        fill(folder / ".." / folder.name, c="three")
    assert address in one_line(info)


def test_what_a_listing_does_not_show_yet_is_read_all_the_same(place, bucket_server):
    address, folder = place
    fill(folder, a="one", b="two")
    shutil.rmtree(folder)
    with bucket_server.faults(hidden=[f"{address.removeprefix('gs://bucket/')}/b"]):
        assert "b" not in Objects(address).sizes()
        assert (mirror.fetch(folder) / "b").read_text() == "two"


KILLED = """
import os, signal, sys
from safepatch_jax.runtime import files, objects, paths
def die(self, names, *checks, method=objects.Objects.{method}):
    method(self, {part})
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
objects.Objects.{method} = die
with files.new_folder(paths.resolve(sys.argv[1])) as out:
    (out / 'a').write_text('one')
    (out / 'b').write_text('two')
"""


def test_a_killed_writer_leaves_nothing_that_is_read_and_the_same_command_mends_it(place):
    """Killed when it uploads, then when it deletes what that left."""
    address, folder = place
    for method, part, when in (
        ("upload", "dict(list(names.items())[:1])", "True"),
        ("delete", "names", "{'a', 'b'} & set(names)"),
    ):
        script = KILLED.format(method=method, part=part, when=when)
        killed = subprocess.run([sys.executable, "-c", script, address], cwd=ROOT, timeout=60)
        assert killed.returncode == -9
        assert mirror.PUBLISHING in Objects(address).sizes()
        with pytest.raises(ValueError, match="is half-written") as info:
            mirror.fetch(folder)
        assert "give the command that wrote it again" in one_line(info)
    fill(folder, a="one", b="two")  # on the same machine, where the killed one had its folder
    assert Objects(address).sizes().keys() == {"a", "b", mirror.LIST}


def test_two_commands_with_one_target_are_kept_apart(place, tmp_path):
    address, folder = place
    script = (
        "import sys\n"
        "from safepatch_jax.runtime import files, mirror, paths\n"
        "with files.new_folder(paths.resolve(sys.argv[1])) as out:\n"
        "    (out / 'a').write_text('two')\n"
    )
    elsewhere = os.environ | {"SAFEPATCH_BUCKETS_DIR": str(tmp_path)}

    def other():
        command = [sys.executable, "-c", script, address]
        return subprocess.run(
            command, cwd=ROOT, env=elsewhere, timeout=60, capture_output=True, text=True
        )

    with files.new_folder(folder) as out:
        Objects(address).write("params/array", b"1")
        assert f"process {os.getpid()} on" in other().stderr
        (out / "a").write_text("one")
    assert Objects(address).sizes().keys() == {"a", "params/array", mirror.LIST}
    assert Objects(address).read("a") == b"one"
    assert "exists and is not empty" in other().stderr


def test_a_folder_that_is_being_filled_is_known_as_half_written(place):
    """Arrays are in the bucket before the folder is published."""
    address, folder = place
    with files.new_folder(folder) as out:
        Objects(address).write("params/array", b"1")
        with pytest.raises(ValueError, match="is half-written"):
            mirror.fetch(folder)
        (out / "a").write_text("one")
    assert Objects(address).sizes().keys() == {"a", "params/array", mirror.LIST}


def test_other_bytes_than_were_published_are_refused(place):
    address, folder = place
    fill(folder, a="one", b="two")
    Objects(address).write("b", b"TWO")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=re.escape(f"{address}/b has other bytes")) as info:
        mirror.fetch(folder)
    one_line(info)
    assert not (folder / "b").exists()


def test_names_that_leave_their_folder_are_refused(place):
    address, folder = place
    listed = {"format": 1, "outputs": {"../../evil": {"bytes": 1, "sha256": "0" * 64}}}
    Objects(address).write(mirror.LIST, json.dumps(listed).encode())
    with pytest.raises(ValueError, match="no name of a file") as info:
        mirror.fetch(folder)
    one_line(info)


def test_a_lease_keeps_others_out_names_its_holder_and_is_let_go(place):
    address, _ = place
    with lease.held(address, wait=False):
        with pytest.raises(ValueError, match="Another run is at work") as info:
            lease.Lease(address).take(wait=False)
        assert f"process {os.getpid()} on " in one_line(info) and "since 20" in str(info.value)
    with lease.held(address, wait=False):
        pass
    assert not Objects(address).sizes()


def test_of_two_that_take_a_lease_at_once_one_gets_it(place):
    address, _ = place
    got, refused = [], []

    def take():
        try:
            taken = lease.Lease(address)
            taken.take(wait=False)
            got.append(taken)
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 3
    got[0].release()


def test_a_lease_of_one_that_is_gone_is_taken_and_who_lost_it_publishes_nothing(place, monkeypatch):
    address, folder = place
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    monkeypatch.setattr(lease, "SECONDS", 0.2)
    gone = lease.Lease(address)
    gone.take(wait=False)
    workspace = Workspace(folder)
    monkeypatch.setitem(holding.Held.leases, address, gone)
    workspace.push()
    taken = lease.Lease(address)
    taken.take(wait=True)  # once it has expired
    gone._renewed = 0.0  # long ago
    (folder / "y").write_text("y")
    with pytest.raises(lease.Lost, match=f"process {os.getpid()} on .* holds it since") as info:
        workspace.push()
    one_line(info)
    assert "y" not in Objects(address).sizes()


def test_who_lost_the_lock_of_a_folder_publishes_nothing_there(place):
    address, folder = place
    with locked(folder.with_name(f".{folder.name}.lock")):
        Objects(f"{address.rpartition('/')[0]}/.{folder.name}.lock").write(lease.NAME, b"{}")
        for held in holding.Held.leases.values():
            held._renewed = 0.0  # long ago
        with pytest.raises(lease.Lost, match="is gone"):
            fill(folder, a="one")
    assert "a" not in Objects(address).sizes()


def test_nothing_is_pushed_before_all_is_here(place, monkeypatch):
    """Of a machine that was away: another one has finished the run since."""
    address, folder = place

    def download(*args, method=Objects.download):
        time.sleep(0.6)  # more than between two pushes
        return method(*args)

    folder.mkdir(parents=True)
    (folder / "a").write_text("old")
    Objects(address).write("a", b"new")
    monkeypatch.setattr(lease, "SECONDS", 1.0)
    monkeypatch.setattr(Objects, "download", download)
    with Workspace(folder).claimed():
        assert (folder / "a").read_text() == "new"
    assert Objects(address).read("a") == b"new"


@pytest.mark.parametrize("when", ["meanwhile", "last"])
def test_a_lease_is_renewed_while_a_push_takes_longer(place, monkeypatch, when):
    address, folder = place
    began, refused = threading.Event(), []

    def upload(self, paths, *args, method=Objects.upload, **options):
        if paths:
            began.set()
            time.sleep(1.7)  # of a large file
            with pytest.raises(ValueError, match="Another run is at work") as info:
                lease.Lease(address).take(wait=False)
            refused.append(info)
        method(self, paths, *args, **options)

    monkeypatch.setattr(lease, "SECONDS", 1.0)
    monkeypatch.setattr(Objects, "upload", upload)
    with Workspace(folder).claimed():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a").write_text("one")
        if when == "meanwhile":
            assert began.wait(10)
    assert len(refused) == 1
    assert Objects(address).read("a") == b"one"


@pytest.mark.parametrize("way", ["pushed", "published"])
def test_who_loses_the_lease_meanwhile_stops_between_files(place, monkeypatch, way):
    address, folder = place
    client, lock = objects.filesystem("gs"), threading.Lock()
    names = [f"{i:02}" for i in range(30)]

    def lose_and_put(*args, put=client.put_file):
        with lock:
            Objects(address).write(lease.NAME, b"{}")
            holding.Held.leases[address]._renewed = 0.0  # long ago
        put(*args)

    monkeypatch.setattr(client, "put_file", lose_and_put)
    with pytest.raises(lease.Lost, match="is gone"), contextlib.ExitStack() as stack:
        if way == "pushed":
            stack.enter_context(Workspace(folder).claimed())
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / name).write_text("x")
        else:
            stack.enter_context(holding.leased(address))
            fill(folder, **dict.fromkeys(names, "x"))
    assert 0 < len(set(names) & Objects(address).sizes().keys()) <= objects._PARALLEL


def test_a_busy_server_is_asked_again(place, bucket_server):
    address, folder = place
    with bucket_server.faults(busy=2):
        fill(folder, a="one")
    assert Objects(address).read("a") == b"one"


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("http://bucket/x", "http:// is not supported"),
        ("gs://", "names no bucket"),
        ("gs://bucket/a/../b", "Give the address without it"),
        ("gs://no-such-bucket/x", "no such bucket"),
        ("gs://bucket/nothing-here", "There is nothing at gs://bucket/nothing-here"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused_in_one_line(bucket_server, address, fix):
    with pytest.raises(ValueError, match=fix) as info:
        paths.readable(address)
    one_line(info)


def test_no_permission_is_told_in_one_line(place, bucket_server):
    with bucket_server.faults(denied=True):
        with pytest.raises(ValueError, match="no permission") as info:
            paths.readable(place[0])
        one_line(info)
        with pytest.raises(ValueError, match="Cannot lock") as info:
            lease.Lease(place[0]).take(wait=False)
        one_line(info)


def test_a_path_stands_for_an_address_also_while_it_is_filled(bucket_server):
    path = paths.resolve("gs://bucket/a/b")
    assert addresses.address_of(path) == "gs://bucket/a/b"
    partial = path.with_name(f".b.0123abcd-{os.getpid()}.x9_.partial") / "c"
    assert addresses.address_of(partial) == "gs://bucket/a/b/c"
    assert addresses.is_partial(partial) and not addresses.is_partial(path)
    assert addresses.address_of("/somewhere/else") == ""
    assert addresses.shown(f"see {path}") == "see gs://bucket/a/b"


def test_conversions_and_patches_go_from_bucket_to_bucket(place, bucket_server, tmp_path):
    address, _ = place
    model = write_tiny_model(tmp_path / "model", dtype="bfloat16")

    def launch(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, text=True, capture_output=True, timeout=200
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    there = f"{address}/model"
    launch("launch.convert", f"--source=hf:{model}", f"--target=hf:{there}", "--certify=hashes")
    back = Objects(there).hashes(["model.safetensors"])["model.safetensors"]["sha256"]
    assert back == files.file_sha256(model / "model.safetensors")
    out = launch(
        "launch.convert", f"--source=hf:{there}", f"--target=hf:{there}", "--certify=hashes", code=2
    )
    assert f"'{there}' exists and is not empty" in out and "Traceback" not in out
    patch = f"{address}/none.safetensors"
    out = launch("launch.patch", "apply", f"--patch={patch}", f"--model={there}", code=2)
    assert "is not changed in place" in out and "Traceback" not in out


def test_processes_without_a_common_folder_share_a_bucket(bucket_server, tmp_path):
    port, running = free_port(), []
    for i in range(2):
        env = os.environ | {
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "SAFEPATCH_BUCKETS_DIR": str(tmp_path / f"host {i}"),
        }
        command = [sys.executable, "tests/runtime/bucket_worker.py", str(port), str(i)]
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    told = []
    with contextlib.ExitStack() as stack:
        for process in running:
            stack.callback(process.kill)
        for process in running:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
            told.append(json.loads(out.splitlines()[-1]))
    assert told[0]["base"] != told[1]["base"]
    for one in told:
        assert one["told"] == "by process 0" and one["outer"] == "outer"
        assert one["equal"] and one["parts"] == 4
        names = one["listed"]
        assert "stage/params/_METADATA" in names and f"stage/{mirror.LIST}" in names
        assert not [name for name in names if ".sharing" in name or "lock" in name]
