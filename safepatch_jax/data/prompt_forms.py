"""The form of a prompt: a question, or a request.

Sets of harmful prompts are mostly requests and sets of harmless look-alikes mostly questions, so a
patch may learn the form in place of the harm; which pairs a patch is derived from can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safepatch_jax.data.chat import Example

_AFTER = " \t\r\n\"')]\u201d\u2019"  # what may stand behind a question mark
FORMS = ("all", "questions", "requests")


def in_form(examples: Sequence[Example], form: str) -> list[Example]:
    """Return the examples whose prompt is a question (it ends with a question mark), or those whose
    prompt is none.

    Args:
      examples: prompts with answers.
      form: one of FORMS.

    Raises:
      ValueError: no prompt has this form, or it is none.
    """
    if form not in FORMS:
        raise ValueError(f"'{form}' is no form of prompts; there are {', '.join(FORMS)}.")
    if form == "all":
        return list(examples)
    result = []
    for example in examples:
        asks = example.prompt.rstrip(_AFTER).endswith(("?", "\uff1f"))
        if asks == (form == "questions"):
            result.append(example)
    if not result:
        raise ValueError(
            f"None of {len(examples)} harmful prompts is of the form '{form}'. Give a D_h that "
            "holds some, or derive.se_prompts=all and derive.osm_prompts=all."
        )
    return result
