"""A model's tokenizer and chat template: conversations in, token ids out."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.prompt_format import PromptFormat
from safepatch_jax.data.rendering import DATE, NotRendered
from safepatch_jax.data.tokenizer import NoChat, decode, load_tokenizer
from safepatch_jax.evaluation.thought_limit import ENDING, ThoughtLimit
from safepatch_jax.models.config import DecoderConfig

# a user's text, the turns of a conversation as in `Prompter.ask`, or (role, text) of each message
Talk = str | Sequence[str] | Sequence[tuple[str, str]]


class Prompter:
    """A model's tokenizer and chat template, without its weights.

    Args:
      config: the model's; its vocabulary and number of positions count.
      folder: whose tokenizer and chat template are taken.
      date, prompt_format: see `Chat`.
      chat: the folder's, of this date and format, where it is at hand: the tokenizer is not loaded
        again.

    Attributes:
      chat: renders conversations; None where the folder has no chat template.
      tokenizer: Hugging Face's.
      thought_limit: what ends the thoughts of its answers, None where they have no limit.

    Raises:
      ValueError: a damaged tokenizer, a vocabulary larger than the model's embedding, or a
        template of `prompt_format` that cannot be used.
    """

    def __init__(
        self,
        config: DecoderConfig,
        folder: str | pathlib.Path,
        date: str = DATE,
        prompt_format: PromptFormat = PromptFormat(),
        chat: Chat | None = None,
    ):
        self.config = config
        try:
            self.chat: Chat | None = chat or Chat(folder, config.vocab_size, date, prompt_format)
            self.tokenizer = self.chat.tokenizer
        except NoChat:
            self.chat, self.tokenizer = None, load_tokenizer(folder, config.vocab_size)
        self.thought_limit: ThoughtLimit | None = None
        if prompt_format.think_tokens:
            ending = tuple(self.encode(ENDING))
            self.thought_limit = ThoughtLimit(prompt_format.think_tokens, ending, self.decode)

    def encode(self, text: str) -> list[int]:
        """Tokenise a text; no special tokens are added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens (but for the tags of a thought) and
        surrounding blanks."""
        return decode(self.tokenizer, ids).strip()

    def room(self, max_new: int) -> int:
        """Return how many tokens an answer of so many may take, its thought included where that
        has a limit."""
        return max_new + (self.thought_limit.room if self.thought_limit else 0)

    def ask(self, *turns: str, system: str | None = None) -> list[int]:
        """Return the ids of a conversation in the chat template: the user's first message, an
        answer, the next message and so on.

        Args:
          system: a system message. Where the template refuses it or leaves it out, it stands before
            the user's first text, and after that of `prompt_format`. None for none: a template
            that puts in one of its own then does so; '' is an empty one in its place.

        Raises:
          ValueError: the model has no chat template, or one that does not render a conversation of
            several turns.
        """
        chat = self.needed_chat()
        if chat.system:
            system = "\n\n".join(filter(None, (chat.system, system)))
        if system is not None:
            ids = self._ask_with_system(turns, system)
            if ids is not None:
                return ids
            if system:
                turns = (f"{system}\n\n{turns[0]}", *turns[1:])
        try:
            return self.encode(chat.open_answer(_messages(turns)))
        except NotRendered as error:
            raise ValueError(
                f"the chat template does not render {len(turns)} messages in turn ({error}). Copy "
                "that of the model's chat variant into the folder."
            ) from error

    def ask_talk(self, talk: Talk, system: str | None = None) -> list[int]:
        """Return the ids of a user's text or a conversation; see `ask`. A system message of the
        conversation's own stands after `system`."""
        turns = [talk] if isinstance(talk, str) else list(talk)
        if isinstance(turns[0], str):
            return self.ask(*turns, system=system)
        if turns[0][0] == "system":
            system = "\n\n".join(filter(None, (system, turns.pop(0)[1])))
        return self.ask(*(text for _, text in turns), system=system)

    def _ask_with_system(self, turns: Sequence[str], system: str) -> list[int] | None:
        """Return None where the template has no place for a system message (Gemma)."""
        messages = [{"role": "system", "content": system}, *_messages(turns)]
        try:
            text = self.needed_chat().open_answer(messages)
        except NotRendered:
            return None
        in_turns = sum(turn.count(system.strip()) for turn in turns)
        return self.encode(text) if text.count(system.strip()) > in_turns else None

    def needed_chat(self) -> Chat:
        """Return what renders conversations. Raises ValueError if the model has no chat
        template."""
        if self.chat is None:
            raise ValueError(
                "the model has no chat template; copy that of its chat variant into the folder, or "
                "let prompts be written without one (template plain, docs/data.md)."
            )
        return self.chat


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
