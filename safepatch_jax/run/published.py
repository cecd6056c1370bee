"""What a run gives away, by name, and how its settings are put into words. Needs no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safepatch_jax.patching.methods import describe

FILES = ("report.md", "report.json", "report.png", "patch.png", "statistics.json")
CARD = "README.md"  # where Hugging Face looks for a model card
CERTIFICATE = "certificate.json"


def data_text(settings: Mapping[str, Mapping[str, Any]], role: str) -> str:
    """Return where a role's records come from."""
    data = settings["data"]
    if role == "harmful" and data["category"]:
        return f"{data[role]}, category {data['category']}"
    return data[role]


def describe_patch(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Say the settings that have a part in the merge, in one line."""
    return describe(settings["patch"], settings["score"]["mode"])
