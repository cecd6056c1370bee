"""The adapter for EleutherAI's lm-evaluation-harness, registered as `safepatch_jax`;
`launch.lm_eval` starts it.

Texts become tokens as in the harness's own `hf` model, so that figures of both can be compared.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

try:
    # The harness adds its own model types only while it knows none.
    import lm_eval.models  # noqa: F401
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is not installed ({error}). Run: pip install 'lm_eval[math]'"
    ) from error

from safepatch_jax.data.prompt_format import AS_IS, SKIP, THINKING, read_format
from safepatch_jax.data.tokenizer import decode
from safepatch_jax.evaluation.batching import padded
from safepatch_jax.evaluation.engine import Engine, first_stop
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import say

MAX_NEW = 256  # tokens of an answer where the task says nothing, as in the `hf` model
# the first one that is given counts
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("safepatch_jax")
class SafePatchLM(TemplateLM):
    """A model folder, or a checkpoint of launch.convert, as the harness sees it; in one process.

    Args:
      pretrained: the folder.
      mesh, compute_dtype: see `Engine.open`.
      batch_size: sequences that run together.
      template_kwargs, thinking: see `data.prompt_format.read_format`.
      think_end_token: of an answer what comes after it counts, as in the `hf` model.

    Raises:
      ValueError: as `Engine.open`; a batch size that is no number, several processes.
    """

    def __init__(
        self,
        pretrained: str,
        mesh: str = "data:1,fsdp:-1,tensor:1",
        compute_dtype: str = "float32",
        batch_size: int | str = 16,
        template_kwargs: str | dict[str, Any] = "",
        thinking: str = AS_IS,
        think_end_token: str = "",
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size must be a whole number of at least 1, got '{batch_size}'."
            )
        if processes.joined():
            raise ValueError("The harness runs in one process; start it on one host.")
        if thinking not in THINKING:
            raise ValueError(f"thinking must be one of {', '.join(THINKING)}, got '{thinking}'.")
        if not isinstance(template_kwargs, str):
            template_kwargs = json.dumps(template_kwargs)
        self._thinking, self._think_end = thinking, think_end_token
        self.engine = Engine.open(
            pretrained,
            mesh=mesh,
            compute_dtype=compute_dtype,
            batch_size=int(batch_size),
            prompt_format=read_format(kwargs=template_kwargs, thinking=thinking),
        )
        self.tokenizer, self.batch_size = self.engine.tokenizer, int(batch_size)
        self._name = str(pretrained)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SafePatchLM:
        """Build from --model_args, or with the batch size of --batch_size.

        The harness's device is left aside: it is cuda:0 where none was given, and JAX knows its
        devices.

        Raises:
          ValueError: an argument that is not known here.
        """
        known = inspect.signature(cls).parameters
        if "pretrained" not in arg_dict or not set(arg_dict) <= set(known):
            raise ValueError(
                f"--model_args of safepatch_jax are {', '.join(known)}; the first one is needed. "
                f"Got {', '.join(arg_dict) or 'none'}."
            )
        arguments = dict(arg_dict)
        batch_size = (additional_config or {}).get("batch_size")
        if batch_size is not None:
            arguments.setdefault("batch_size", batch_size)
        return cls(**arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> SafePatchLM:
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")  # the harness makes a part of a file name of it

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenise with the tokens that the tokenizer itself adds, but no second begin-of-text
        token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; without a generation prompt its last message is left open, to be
        continued."""
        if self.engine.chat is None:
            raise ValueError("This model has no chat template: leave --apply_chat_template out.")
        if add_generation_prompt and self._thinking == SKIP:
            return self.engine.chat.open_answer(chat_history)
        return self.engine.chat.render(
            chat_history, generate=add_generation_prompt, resume=not add_generation_prompt
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        room = self._longest() + 1
        pairs, cut = [], 0
        for _, context, continuation in requests:
            if len(continuation) >= room:
                raise ValueError(
                    f"A continuation of {len(continuation)} tokens does not fit into {room - 1} "
                    "positions."
                )
            excess = max(0, len(context) + len(continuation) - room)
            pairs.append((context[excess:], continuation))
            cut += excess > 0
        if cut:
            say(
                f"{cut} of {len(pairs)} contexts are longer than the model's positions and were "
                "cut at their beginning."
            )

        def keep(index, result):
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], result)

        return self.engine.score(pairs, "lm-eval: likelihoods", keep)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text in nats; long ones in windows that predict
        each token once."""
        windows, numbers = [], []
        for number, request in enumerate(requests):
            cuts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                self.prefix_token_id,
                max_seq_len=self._longest(),
                context_len=1,
            )
            for cut in cuts:
                windows.append((None, *utils.make_disjoint_window(cut)))
                numbers.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(numbers, self._loglikelihood_tokens(windows)):
            sums[number] += logprob
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop texts, an end token, or the most tokens asked
        for.

        Raises:
          ValueError: a generation argument that is not known here, or no room for the tokens asked
            for.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for arguments, numbers in groups.items():
            group = [requests[number] for number in numbers]
            for number, text in zip(numbers, self._generate(group, numbers, arguments)):
                texts[number] = text
        return texts

    def _generate(
        self, requests: Sequence[Instance], numbers: Sequence[int], arguments: str
    ) -> list[str]:
        """Continue requests that have the same generation arguments, JSON."""
        until, max_new, sampling = generation_arguments(json.loads(arguments))
        room = self._longest(max_new)
        prompts = [
            self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]
            for request in requests
        ]
        texts = [""] * len(requests)

        def keep(index: int, ids: Sequence[int]) -> None:
            if self._think_end:
                text = decode(self.tokenizer, ids)  # a tag may be a special token
            else:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
            text = text[: first_stop(text, until)]
            if self._think_end:
                text = text.split(self._think_end)[-1].lstrip()
            texts[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])

        self.engine.complete_ids(
            prompts, max_new, "lm-eval: answers", sampling, keep, numbers, until
        )
        return texts

    def _longest(self, max_new: int = 0) -> int:
        """Return how many tokens a prompt may have so that its padding fits too (see `padded`)."""
        limit = self.engine.config.max_length - max_new
        if limit < 8:
            raise ValueError(
                f"{max_new} new tokens leave no room for a prompt in "
                f"{self.engine.config.max_length} positions. Lower max_gen_toks with --gen_kwargs."
            )
        length = limit
        while padded(length) > limit:
            length -= 1
        return length


def generation_arguments(given: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Return stop texts, most new tokens and sampling of a task's generation arguments.

    As in the harness, a temperature of 0 or do_sample=False is greedy, and do_sample=True alone
    samples at temperature 1.

    Raises:
      ValueError: an argument that is not known here.
    """
    given = dict(given)
    until = given.pop("until", None) or []
    if isinstance(until, str):
        until = [until]
    lengths = [given.pop(name, None) for name in _LENGTHS]
    max_new = next((int(length) for length in lengths if length is not None), MAX_NEW)
    do_sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if do_sample else 0.0))
    if do_sample is False:
        temperature = 0.0
    sampling = Sampling(temperature, float(given.pop("top_p", 1.0)), int(given.pop("seed", 0)))
    if given:
        raise ValueError(
            f"Generation argument {', '.join(given)}: not known to safepatch_jax, which takes "
            f"until, do_sample, temperature, top_p, seed, {', '.join(_LENGTHS)}."
        )
    return list(until), max_new, sampling
