"""README's commands, extracted and run as they stand on a tiny model; all of them that can run:
`python -m benchmarks.readme_commands`."""

import re

import pytest

from benchmarks import readme_commands
from benchmarks.readme_commands import ROOT
from tests.conftest import CACHE

# Those that take half a minute together; the others take as long each, or longer.
QUICK = ("--help", "patch apply", "--data=")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return readme_commands.lay_out(tmp_path_factory.mktemp("reader") / "files")


@pytest.mark.parametrize("part", QUICK)
def test_commands_run_as_they_stand_without_stray_lines(part, files, tmp_path):
    (command,) = [text for text in readme_commands.commands() if part in text]
    result = readme_commands.call(command, files, tmp_path / "work", CACHE / "home")
    assert result.code == 0, result.err
    assert readme_commands.stray(result.err) == []


def test_every_command_runs_or_is_left_out_with_a_reason():
    texts = readme_commands.commands()
    left_out = [text for text in texts if readme_commands.reason(text)]
    assert len(texts) - len(left_out) > 10
    assert [text.split()[0] for text in left_out] == ["make", "make", "launch/tpu_pod.sh"]


def test_a_command_has_the_share_of_a_card_that_its_run_needs():
    """docs/gpu.md says which: of four H200 70B needs more than JAX takes of itself."""
    table = (ROOT / "docs" / "gpu.md").read_text()
    share = re.search(r"llama3_70b.*=h200:4 .*`(XLA_CLIENT_MEM_FRACTION=\S+)`", table)[1]
    on_cards = "llama3_70b_v5p_2x2x2 --mesh=fsdp:4"
    (command,) = [text for text in readme_commands.commands() if on_cards in text]
    assert command.startswith(f"{share} safepatch run")
    config = (ROOT / "configs" / "llama3_70b_v5p_2x2x2.py").read_text()
    assert f"{share} python -m launch.safepatch" in config


@pytest.mark.parametrize(
    "line, is_stray",
    [
        ("  export:   0%|          | 0.00/75.1k [00:00<?, ?B/s]", False),
        ("  answers: 100%|##########| 3/3 [00:02<00:00,  2.54s/answer, 189 tokens/s]", False),
        ("  write: 0.00B [00:00, ?B/s]", False),
        ("error: No patch file 'FILE'.", False),
        ("WARNING: All log messages before absl::InitializeLog() is called", True),
        ("W0000 00:00:1 cpu_client.cc:1] slow compile", True),
        ("/lib/x.py:3: UserWarning: deprecated", True),
    ],
)
def test_lines_of_other_libraries_are_told_from_bars(line, is_stray):
    assert readme_commands.stray(f"\r{line}\r\n") == ([line] if is_stray else [])
