"""How conversations are written for a model: in which template, and with which system message.

A model's own chat template is the default. `plain` writes headings without chat tokens, as a base
model can read them and as Yao et al. 2023 (arXiv 2310.10683, their code) train and ask:

    ### Question: {prompt}
     ### Answer: {answer}{eos}

A system message stands above it with a blank line between; the text begins with the tokenizer's
begin-of-text token where the tokenizer itself puts one. The blank after the colon is the answer's,
as tokenizers of words need it: prompts end in the colon. A file's template is rendered within the
bounds of `rendering`, as any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

from safepatch_jax.option import nearest
from safepatch_jax.runtime import paths
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, reading, refuse_pointer

OWN, PLAIN = "own", "plain"
_PLAIN_TEXT = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Question: ' + m['content'] + '\n ### Answer:' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
)
_CHOICES = f"'{PLAIN}', or '{OWN}' for the tokenizer's own"


def template_name(text: str) -> str:
    """Return the name of a template as `PromptFormat` has it: '' for 'own', 'plain', or a path."""
    if text in ("", OWN):
        return ""
    return text if text == PLAIN else paths.plain(text)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """A choice of template and system message; `read_format` makes it of what a user wrote.

    Attributes:
      name: '' for the tokenizer's own chat template, 'plain', or the path of a Jinja file.
      system: the message that stands before every conversation; '' for none.
      text: of the file's template.
    """

    name: str = ""
    system: str = ""
    text: str = ""

    @property
    def sha256(self) -> str:
        """Of the file's template; '' where it is no file."""
        return hashlib.sha256(self.text.encode()).hexdigest() if self.text else ""

    @property
    def label(self) -> str:
        """What a report calls the template: a word that a file's name can hold."""
        return re.sub(r"[^\w.-]+", "_", pathlib.PurePath(self.name).name) or OWN

    def key(self) -> dict[str, str]:
        """Return what decides the prompts, for keys and records: of a file its content, whatever
        its name; nothing of what is the default."""
        key = {}
        if self.name:
            key["template"] = f"sha256:{self.sha256}" if self.text else self.name
        if self.system:
            key["system"] = self.system
        return key

    def describe(self) -> str:
        """Say what prompts are written in."""
        text = "the tokenizer's chat template"
        if self.text:
            text = f"the template {self.label} (SHA-256 {self.sha256})"
        elif self.name:
            text = "plain question and answer headings, without chat tokens"
        return f"{text}, after the system message '{self.system}'" if self.system else text

    def template_for(self, tokenizer: Any) -> str:
        """Return the Jinja text; '' for the tokenizer's own."""
        if self.name != PLAIN:
            return self.text
        first = tokenizer("")["input_ids"][:1]
        begin = "{{ bos_token }}" if first and first[0] == tokenizer.bos_token_id else ""
        return begin + _PLAIN_TEXT

    def check(self, chat: Any, folder: str | pathlib.Path) -> None:
        """Refuse a chosen template that cannot be used with a model.

        Args:
          chat: a `Chat` that renders in it.
          folder: of the model.

        Raises:
          ValueError: the tokenizer has no token that ends an answer; the template fails, or leaves
            out what is said.
        """
        fix = f"Edit it, or give {_CHOICES}."
        prompt, answer = "What is a rainbow?", "Light in drops of rain."
        if chat.tokenizer.eos_token_id is None:
            raise Refused(
                f"{folder}: the tokenizer has no eos_token, with which an answer ends in the "
                f"template {self.name}. Set it in tokenizer_config.json."
            )
        try:
            before = chat.prompt_text(prompt)
        except ValueError as error:
            raise Refused(
                f"{self.name}: the template does not render a user's message: {error}. {fix}"
            ) from error
        if prompt not in before:
            raise Refused(
                f"{self.name}: the template does not render a user's message: of its text nothing "
                f"is in {before!r:.100}. {fix}"
            )
        if answer not in chat.decode(chat.encode(prompt, answer).answer_ids):
            raise Refused(
                f"{self.name}: the template does not render an answer behind its prompt. {fix}"
            )


def read_format(template: str = "", system: str = "") -> PromptFormat:
    """Return a format, a file's template with it.

    Args:
      template: '' or 'own', 'plain', or the path of a Jinja file.
      system: see `PromptFormat`.

    Raises:
      ValueError: there is no such file, it cannot be read, holds nothing or too much.
    """
    name = template_name(template)
    text = _read_template(pathlib.Path(name)) if name not in ("", PLAIN) else ""
    return PromptFormat(name, system if system.strip() else "", text)


def _read_template(path: pathlib.Path) -> str:
    fix = f"Give another Jinja file, {_CHOICES}."
    if not path.is_file():
        hint = nearest(str(path), (OWN, PLAIN))
        raise Refused(f"There is no template file '{path}'{hint}. {fix}")
    refuse_pointer(path)
    most = limit("TEMPLATE_BYTES")
    with reading(path, "a chat template", fix):
        with open(path, "rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise Refused(f"{path}: a template of {too_much('TEMPLATE_BYTES')}. {fix}")
        text = raw.decode("utf-8-sig")
        if not text.strip():
            raise Refused(f"{path}: the template is empty. {fix}")
        return text
