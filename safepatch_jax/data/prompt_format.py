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
import json
import pathlib
import re
from typing import Any

from safepatch_jax.data import rendering
from safepatch_jax.option import nearest
from safepatch_jax.runtime import paths
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, reading, refuse_pointer

OWN, PLAIN = "own", "plain"
THINKING = AS_IS, SKIP = ("as_is", "skip")
# What a template is given in any case.
_RESERVED = (
    "messages",
    "conversations",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)
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


def template_variables(text: str) -> str:
    """Return what a chat template is given besides, as sorted JSON; '' for nothing.

    Args:
      text: 'NAME=VALUE,NAME=VALUE', where a value that is no JSON is a text, or a JSON object.

    Raises:
      ValueError: it is neither, or gives what a template is given in any case.
    """
    expected = "expected NAME=VALUE,NAME=VALUE (enable_thinking=false) or a JSON object"
    text = text.strip()
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise Refused(
                f"template_kwargs {text!r:.100}: no JSON ({error}); {expected}"
            ) from error
    else:
        values = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name in values:
                raise Refused(f"template_kwargs {text!r:.100}: {part!r:.60}; {expected}, each once")
            values[name] = _value(value)
    for name in values:
        if not name.isidentifier():
            raise Refused(f"template_kwargs: {name!r:.60} is no name; {expected}")
        if name in _RESERVED or name.endswith("_token"):
            raise Refused(
                f"template_kwargs: {name} is what a template is given in any case. Leave it out; "
                "a system message is given with data.system."
            )
    return json.dumps(values, sort_keys=True) if values else ""


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("on", "off", "yes", "no"):
        raise Refused(f"template_kwargs: '{text}' would be a text; write true or false.")
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """A choice of template and system message; `read_format` makes it of what a user wrote.

    Attributes:
      name: '' for the tokenizer's own chat template, 'plain', or the path of a Jinja file.
      system: the message that stands before every conversation; '' for none.
      text: of the file's template.
      kwargs: what the template is given besides, as `template_variables` returns it.
      thinking: 'as_is', or 'skip': a model's own answers are written behind an empty thought.
      think_tokens: a thought of so many tokens is ended; 0 for no limit of its own.
    """

    name: str = ""
    system: str = ""
    text: str = ""
    kwargs: str = ""
    thinking: str = AS_IS
    think_tokens: int = 0

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given besides."""
        return json.loads(self.kwargs or "{}")

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
        if self.kwargs:
            key["template_kwargs"] = self.kwargs
        return key

    def describe(self) -> str:
        """Say what prompts are written in."""
        text = "the tokenizer's chat template"
        if self.text:
            text = f"the template {self.label} (SHA-256 {self.sha256})"
        elif self.name:
            text = "plain question and answer headings, without chat tokens"
        if self.kwargs:
            text += f" given {self.kwargs}"
        if self.thinking == SKIP:
            text += ", thoughts skipped"
        if self.think_tokens:
            text += f", thoughts ended at {self.think_tokens} tokens"
        return f"{text}, after the system message '{self.system}'" if self.system else text

    def template_for(self, tokenizer: Any) -> str:
        """Return the Jinja text; '' for the tokenizer's own."""
        if self.name != PLAIN:
            return self.text
        first = tokenizer("")["input_ids"][:1]
        begin = "{{ bos_token }}" if first and first[0] == tokenizer.bos_token_id else ""
        return begin + _PLAIN_TEXT

    def check_variables(self, tokenizer: Any, folder: str | pathlib.Path) -> None:
        """Raise ValueError for a variable that the template never reads."""
        if not self.kwargs:
            return
        template = self.template_for(tokenizer) or tokenizer.get_chat_template()
        names = rendering.variables_of(template)
        for name in self.variables:
            if name not in names:
                known = [n for n in names if n not in _RESERVED and not n.endswith("_token")]
                there = f"It reads {', '.join(known)}." if known else "It reads none."
                raise Refused(
                    f"{self.name or folder}: the chat template never reads {name!r:.60}"
                    f"{nearest(name, known)} (template_kwargs). {there} Correct the name, or leave "
                    "it out."
                )

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


def read_format(
    template: str = "",
    system: str = "",
    kwargs: str = "",
    thinking: str = AS_IS,
    think_tokens: int = 0,
) -> PromptFormat:
    """Return a format, a file's template with it.

    Args:
      template: '' or 'own', 'plain', or the path of a Jinja file.
      system, thinking, think_tokens: see `PromptFormat`.
      kwargs: see `template_variables`.

    Raises:
      ValueError: there is no such file, it cannot be read, holds nothing or too much.
    """
    name = template_name(template)
    text = _read_template(pathlib.Path(paths.readable(name))) if name not in ("", PLAIN) else ""
    system = system if system.strip() else ""
    variables = template_variables(kwargs)
    return PromptFormat(name, system, text, variables, thinking, think_tokens)


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
