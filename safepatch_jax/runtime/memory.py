"""How much memory programs can have here: what the machine has free, within the limits of its
container."""

from __future__ import annotations

import os
import pathlib
import re

# Of control groups, by their controller ('' where there is one tree for all): where they lie, the
# names of the limit and of what is used, and of that, files that are kept as long as there is room.
_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def available_memory() -> int:
    """Return the bytes of memory that programs can have: those that the machine has free, or fewer
    where a control group (a container's, a batch job's) leaves fewer."""
    free = [_of_machine()]
    for line in _text(pathlib.Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        for controller in {*controllers.split(",")} & _GROUPS.keys():
            free += _of_groups(name, *_GROUPS[controller])
    return max(1, min(free))  # 0 would be no answer


def _of_machine() -> int:
    text = _text(pathlib.Path("/proc/meminfo"))
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
        return 1024 * int(match[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(name: str, top: str, limit: str, used: str, kept: str) -> list[int]:
    """Return what a control group and those that it is in leave, where they have a limit. Those
    above a container's are not seen in it."""
    root, free = pathlib.Path(top), []
    group = root / name.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        most, taken = _text(folder / limit).strip(), _text(folder / used).strip()
        if most.isdecimal() and taken.isdecimal():
            match = re.search(rf"^{kept} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            free.append(int(most) - int(taken) + (int(match[1]) if match else 0))
    return free


def _text(path: pathlib.Path) -> str:
    """Return the content of a file, '' where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
