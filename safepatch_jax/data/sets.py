"""The public data sets that can be named: what each is, where its files are, and which column holds
what.

One row of `_ENTRIES` a set (docs/data.md, "Adding a data set"); `builders` prepares any of them. A
file without a checksum is not downloaded, since its published bytes are not known here: it must be
fetched by hand. No file of these sets is part of this project.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from safepatch_jax.data import layouts
from safepatch_jax.data.tables import Row, read_rows

# What records of all sets have, as texts.
FIELDS = ("id", "prompt", "answer", "category", "type", "label", "extra")
# prepared sets and downloads; in manual/ files fetched by hand
DATA_DIR = "~/.cache/safepatch_jax/datasets"
_GITHUB, _HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"


@dataclasses.dataclass(frozen=True)
class File:
    """A published file: address, SHA-256 of its bytes ('' if not known), names that it may have in
    manual_dir."""

    url: str
    sha256: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one file for one role ('utility': for measuring answers only); `rows` is the
    published number."""

    role: str
    rows: int
    file: File


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A public data set.

    Attributes:
      splits: by name.
      columns: {field: column of the file}; the other columns are kept as `extra`.
      split_by: the column whose value is the split, in files that hold several.
      adapt: changes a row in place before the columns are read.
      read: returns a file's rows.
    """

    name: str
    description: str
    citation: str
    licence: str
    homepage: str
    splits: dict[str, Split]
    columns: dict[str, str]
    split_by: str = ""
    adapt: Callable[[Row], None] | None = None
    read: Callable[[pathlib.Path], list[Row]] = read_rows

    @property
    def has_answers(self) -> bool:
        return "answer" in self.columns

    def first_split(self, role: str) -> str | None:
        return next((name for name, split in self.splits.items() if split.role == role), None)


_XSTEST = File(
    f"{_HUB}/Paul/XSTest/resolve/f600c994b256f12867dfa5b3eb3d545a3e62f8b5/xstest_prompts.csv",
    "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    ("xstest_prompts.csv",),
)
_MMLU = File(
    "https://people.eecs.berkeley.edu/~hendrycks/data.tar",
    "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
    ("mmlu.tar", "mmlu.zip"),
)


def _beavertails_file(path: str, sha256: str = "") -> File:
    folder, name = path.split("/")
    return File(
        f"{_HUB}/PKU-Alignment/BeaverTails/resolve/8401fe609d288129cc684a9b3be6a93e41cfe678/round0/{path}",
        sha256,
        (f"beavertails_{folder}_{name}",),
    )


def _harmbench_file(part: str, sha256: str) -> File:
    name = f"harmbench_behaviors_text_{part}.csv"
    return File(
        f"{_GITHUB}/centerforaisafety/HarmBench/8e1604d1171fe8a48d8febecd22f600e462bdcdd/data/behavior_datasets/{name}",
        sha256,
        (name,),
    )


def _jailbreakbench_file(part: str, sha256: str) -> File:
    return File(
        f"{_HUB}/JailbreakBench/JBB-Behaviors/resolve/886acc352a31533ffbcf4ef22c744658688086fc/data/{part}-behaviors.csv",
        sha256,
        (f"jailbreakbench_{part}-behaviors.csv", f"{part}-behaviors.csv"),
    )


def _or_bench_file(part: str, sha256: str = "") -> File:
    name = f"or-bench-{part}.csv"
    return File(
        f"{_HUB}/bench-llm/or-bench/resolve/e36d8b80e81837c8a8f264bbb2a49f1b32c7e272/{name}",
        sha256,
        (name,),
    )


def _gsm8k_file(part: str, sha256: str) -> File:
    folder = "grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
    return File(f"{_GITHUB}/openai/{folder}/{part}.jsonl", sha256, (f"gsm8k_{part}.jsonl",))


_ENTRIES = (
    DataSet(
        "advbench",
        "Harmful instructions, each with an affirmative opening of an answer; many are "
        "near-duplicates.",
        "Zou et al. 2023, Universal and Transferable Adversarial Attacks on Aligned Language "
        "Models, arXiv:2307.15043",
        "MIT",
        "https://github.com/llm-attacks/llm-attacks",
        {
            "train": Split(
                "harmful",
                520,
                File(
                    f"{_GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
                    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
                    ("advbench_harmful_behaviors.csv", "harmful_behaviors.csv"),
                ),
            )
        },
        {"prompt": "goal", "answer": "target"},
    ),
    DataSet(
        "beavertails",
        "Questions with several answers each, labelled safe or unsafe, in 14 harm categories.",
        "Ji et al. 2023, BeaverTails: Towards Improved Safety Alignment of LLM via a "
        "Human-Preference Dataset, arXiv:2307.04657",
        "CC-BY-NC-4.0",
        "https://github.com/PKU-Alignment/beavertails",
        {
            "30k_train": Split("harmful", 27186, _beavertails_file("30k/train.jsonl.gz")),
            "30k_test": Split("harmful", 3021, _beavertails_file("30k/test.jsonl.gz")),
            "330k_train": Split(
                "harmful",
                300567,
                _beavertails_file(
                    "330k/train.jsonl.xz",
                    "12f04c9200000929ebbc616c29cb53331f6df36e7341d73e4a12cffac0eb1c08",
                ),
            ),
            "330k_test": Split(
                "harmful",
                33396,
                _beavertails_file(
                    "330k/test.jsonl.xz",
                    "1c726c662b85bf4761913041fe9e098f80e5206344864597dbde86bc9a1bfc96",
                ),
            ),
        },
        {"prompt": "prompt", "answer": "response", "category": "category", "label": "label"},
        adapt=layouts.beavertails,
    ),
    DataSet(
        "harmbench",
        "Harmful text behaviours: standard, contextual and copyright (the type); no answers.",
        "Mazeika et al. 2024, HarmBench: A Standardized Evaluation Framework for Automated Red "
        "Teaming, arXiv:2402.04249",
        "MIT",
        "https://github.com/centerforaisafety/HarmBench",
        {
            "test": Split(
                "harmful",
                320,
                _harmbench_file(
                    "test", "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29"
                ),
            ),
            "val": Split(
                "harmful",
                80,
                _harmbench_file(
                    "val", "7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534"
                ),
            ),
        },
        {
            "id": "BehaviorID",
            "prompt": "Behavior",
            "category": "SemanticCategory",
            "type": "FunctionalCategory",
        },
        adapt=layouts.harmbench,
    ),
    DataSet(
        "strongreject",
        "Forbidden prompts in six categories; no answers.",
        "Souly et al. 2024, A StrongREJECT for Empty Jailbreaks, arXiv:2402.10260",
        "MIT",
        "https://github.com/alexandrasouly/strongreject",
        {
            "test": Split(
                "harmful",
                313,
                File(
                    f"{_GITHUB}/alexandrasouly/strongreject/f7cad6c17e624e21d8df2278e918ae1dddb4cb56/strongreject_dataset/"
                    "strongreject_dataset.csv",
                    "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
                    ("strongreject_dataset.csv",),
                ),
            )
        },
        {"prompt": "forbidden_prompt", "category": "category", "type": "source"},
    ),
    DataSet(
        "jailbreakbench",
        "100 harmful behaviours with openings of answers, and 100 harmless ones on the same "
        "topics.",
        "Chao et al. 2024, JailbreakBench: An Open Robustness Benchmark for Jailbreaking LLMs, "
        "arXiv:2404.01318",
        "MIT",
        "https://jailbreakbench.github.io",
        {
            "harmful": Split(
                "harmful",
                100,
                _jailbreakbench_file(
                    "harmful", "4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1"
                ),
            ),
            "benign": Split(
                "lookalike",
                100,
                _jailbreakbench_file(
                    "benign", "3cda234d21a991fa309bbfea4b6d9dae31ccdf8e9d452424b6a983e4fdc33468"
                ),
            ),
        },
        {
            "id": "Index",
            "prompt": "Goal",
            "answer": "Target",
            "category": "Category",
            "type": "Behavior",
        },
    ),
    DataSet(
        "do_not_answer",
        "Questions that a responsible model does not answer, in five risk areas and twelve types "
        "of harm.",
        "Wang et al. 2023, Do-Not-Answer: A Dataset for Evaluating Safeguards in LLMs, "
        "arXiv:2308.13387",
        "CC-BY-NC-SA-4.0",
        "https://github.com/Libr-AI/do-not-answer",
        {
            "test": Split(
                "harmful",
                939,
                File(
                    f"{_GITHUB}/Libr-AI/do-not-answer/460703484df354958a5e1cd7378a38fcb94a2f3e/datasets/Instruction/do_not_answer_en.csv",
                    "06acfa39a06a1b33d1f264ce41b4f7a95812010c594fb733ae4717ee0a4544fc",
                    ("do_not_answer_en.csv",),
                ),
            )
        },
        {"id": "id", "prompt": "question", "category": "risk_area", "type": "types_of_harm"},
    ),
    DataSet(
        "xstest",
        "XSTest v2: 250 safe prompts that look unsafe and 200 unsafe contrasts, by type of "
        "prompt; no answers.",
        "Röttger et al. 2024, XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours "
        "in LLMs, arXiv:2308.01263",
        "CC-BY-4.0",
        "https://github.com/paul-rottger/xstest",
        {"safe": Split("lookalike", 250, _XSTEST), "unsafe": Split("harmful", 200, _XSTEST)},
        {"id": "id", "prompt": "prompt", "category": "type", "label": "label"},
        split_by="label",
    ),
    DataSet(
        "oktest",
        "Harmless prompts with alarming words; no answers, no categories.",
        "Shi et al. 2024, Navigating the OverKill in Large Language Models, arXiv:2401.17633",
        "none stated",
        "https://github.com/InvokerStark/OverKill",
        {
            "test": Split(
                "lookalike",
                300,
                File(
                    f"{_GITHUB}/InvokerStark/OverKill/9551a7ff7b2cb18d178e64fb5cc95e4684311b3b/data/OKTest.csv",
                    "1be3e8d3fe6b45a170653da63c8cf70dbf97508a48735e65db0713a44e158860",
                    ("OKTest.csv",),
                ),
            )
        },
        {"prompt": "prompt"},
    ),
    DataSet(
        "or_bench",
        "Prompts that seem harmful and are not, in ten categories, with a harmful counterpart; no "
        "answers.",
        "Cui et al. 2024, OR-Bench: An Over-Refusal Benchmark for Large Language Models, "
        "arXiv:2405.20947",
        "CC-BY-4.0",
        "https://huggingface.co/datasets/bench-llm/or-bench",
        {
            "hard_1k": Split(
                "lookalike",
                1319,
                _or_bench_file(
                    "hard-1k", "a6e2f1166416efe5901f3bb05c47dc92ab3aca3acfe143693d38b8057d841e6d"
                ),
            ),
            "80k": Split("lookalike", 80359, _or_bench_file("80k")),
            "toxic": Split("harmful", 655, _or_bench_file("toxic")),
        },
        {"prompt": "prompt", "category": "category"},
    ),
    DataSet(
        "alpaca",
        "Ordinary instructions with answers, written by text-davinci-003.",
        "Taori et al. 2023, Stanford Alpaca: An Instruction-following LLaMA model",
        "CC-BY-NC-4.0",
        "https://github.com/tatsu-lab/stanford_alpaca",
        {
            "train": Split(
                "ordinary",
                52002,
                File(
                    f"{_GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
                    "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
                    ("alpaca_data.json",),
                ),
            )
        },
        {"prompt": "instruction", "answer": "output"},
        adapt=layouts.alpaca,
    ),
    DataSet(
        "mmlu",
        "Questions with four choices in 57 subjects (the category); the answer is a letter, the "
        "choices are in extra.",
        "Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding, "
        "arXiv:2009.03300",
        "MIT",
        "https://github.com/hendrycks/test",
        {
            "test": Split("utility", 14042, _MMLU),
            "val": Split("utility", 1531, _MMLU),
            "dev": Split("utility", 285, _MMLU),
        },
        {"prompt": "question", "answer": "answer", "category": "subject"},
        split_by="split",
        read=layouts.mmlu_rows,
    ),
    DataSet(
        "gsm8k",
        "Grade-school problems; the answer is the worked solution, its number stands in extra as "
        "'final'.",
        "Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv:2110.14168",
        "MIT",
        "https://github.com/openai/grade-school-math",
        {
            "train": Split(
                "ordinary",
                7473,
                _gsm8k_file(
                    "train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
                ),
            ),
            "test": Split(
                "utility",
                1319,
                _gsm8k_file(
                    "test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
                ),
            ),
        },
        {"prompt": "question", "answer": "answer"},
        adapt=layouts.gsm8k,
    ),
    DataSet(
        "mt_bench",
        "80 two-turn questions in eight categories; the prompt is the first turn, extra holds "
        "turns and references.",
        "Zheng et al. 2023, Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, "
        "arXiv:2306.05685",
        "Apache-2.0",
        "https://github.com/lm-sys/FastChat",
        {
            "test": Split(
                "utility",
                80,
                File(
                    f"{_GITHUB}/lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d/fastchat/llm_judge/data/mt_bench/question.jsonl",
                    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
                    ("mt_bench_question.jsonl",),
                ),
            )
        },
        {"id": "question_id", "prompt": "prompt", "category": "category"},
        adapt=layouts.mt_bench,
    ),
)
SETS = {entry.name: entry for entry in _ENTRIES}
