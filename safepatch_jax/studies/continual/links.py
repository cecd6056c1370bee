"""The links of a chain as --links names them, and the methods beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.patch_file.log_lines import NAME
from safepatch_jax.runtime import paths
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual.measures import COMMON


@dataclasses.dataclass(frozen=True)
class Link:
    """An entry of --links: a name and the harmful data; '' stands for the run's data.harmful."""

    name: str
    harmful: str
    category: str

    def data(self, settings: Settings) -> dict[str, str]:
        """Return the harmful data and the category as the log has them."""
        return {"harmful": self.harmful or settings.data.harmful, "category": self.category}

    def settings(self, settings: Settings, seed: int) -> Settings:
        """Return the chain's settings with this link's harmful data and its seed, see
        `seeds_of`."""
        return settings.override(
            {
                "data.harmful": self.harmful or settings.data.harmful,
                "data.category": self.category,
                "run.seed": seed,
                "align.enabled": False,
            }
        )


def seeds_of(log: PatchLog | None, first: int, links: Sequence[Link]) -> dict[str, int]:
    """Return the seed of each link of a chain, by name; a link that was made keeps its own.

    With one seed random retention would draw the same entries in every link, and the draws are to
    be independent; so a place that a removal has freed counts too.
    """
    made, removals = {}, 0
    if log is not None:
        made = {log.links[number]["name"]: log.links[number]["seed"] for number in log.live}
        removals = sum(entry["entry"] == "remove" for entry in log.entries)
    return {link.name: made.get(link.name, first + i + removals) for i, link in enumerate(links)}


def parse_links(text: str) -> tuple[Link, ...]:
    """Read --links: NAME (a category of data.harmful), NAME=cat:A+B (several), NAME=SOURCE (a data
    set), with ';' between.

    Raises:
      ValueError: nothing given, not of this form, or a name twice.
    """
    links = [_parse_link(part.strip()) for part in text.split(";") if part.strip()]
    if not links:
        raise ValueError(
            "--links is empty; give for instance "
            "--links='fraud;hate=cat:hate_speech+slurs;malware=malware.csv'."
        )
    counts = Counter(link.name for link in links)
    clashes = sorted(name for name, count in counts.items() if count > 1 or name in COMMON)
    if clashes:
        raise ValueError(
            f"--links: the name {', '.join(clashes)} stands there twice or is taken "
            f"({', '.join(COMMON)} are). Give each link a name of its own: NAME=cat:CATEGORY."
        )
    return tuple(links)


def _parse_link(entry: str) -> Link:
    name, equals, data = (part.strip() for part in entry.partition("="))
    if not NAME.fullmatch(name) or bool(equals) != bool(data):
        raise ValueError(
            f"--links: '{entry}' is not NAME, NAME=cat:A+B or NAME=SOURCE with a name of letters, "
            "digits, '_', '.' and '-'. A category of another name is given as NAME=cat:CATEGORY."
        )
    if not data:
        return Link(name, "", name)
    if data.startswith("cat:"):
        return Link(name, "", data.removeprefix("cat:"))
    return Link(name, paths.data(data), "")
