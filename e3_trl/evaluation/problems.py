"""Problems with answers, from files or the Hub: what is evaluated on, and what training data are made from."""

import re
import unicodedata
from decimal import Decimal
from pathlib import Path

import pandas as pd
from datasets import load_dataset

from ..rewards import REWARD_FUNCS
from ..rewards.reasoning_gym import is_reasoning_gym, load_splits


# The first of these that a dataset has, in any case.
COLUMNS = {
    "prompt": ("problem", "prompt", "question"),
    "solution": ("answer", "final_answer", "solution"),  # OlympiadBench's `solution` is worked out
    "source": ("source", "data_source"),
}
FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}

_LATEX_DELIMITER = re.compile(r"(?<!\\)\$|\\[(\[]|\\boxed")
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,3}")
_WORDS = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_TEXT_GROUP = re.compile(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}")
# Commands that change how a formula looks and not what it says, and who posed the problem, at its end.
_LATEX_LOOKS = re.compile(
    r"\\(?:left|right|big{1,2}[lr]?|displaystyle|limits|q?quad)(?![a-z])|\\tag\{[^{}]*\}"
    r"|\\[,;:!> ]|\\[()\[\]]|[_^]\{\}|[$~]"
)
_CREDIT = re.compile(r"\[i\][^\[\]]*(?:\[/i\])?\s*$")
_FORUM_TAG = re.compile(r"\[/?(?:b|i|u|list|\*)\]")
_ALIGNED = re.compile(r"\\begin\{align(?:ed)?\*?\}(.*?)\\end\{align(?:ed)?\*?\}", re.DOTALL)
# Commands that say the same.
_SYNONYMS = {
    "frac": "[dt]frac", "le": "leq|leqslant", "ge": "geq|geqslant", "ne": "neq", "vee": "lor", "wedge": "land",
    "to": "rightarrow", "dots": "[cl]dots|dots[bc]",
}  # fmt: skip


def load_problems(
    name: str,
    split: str = "test",
    columns: dict[str, str] | None = None,
    config: dict | str | None = None,
) -> pd.DataFrame:
    """
    Load problems and their answers.

    Args:
        name (`str`):
            Parquet, JSON or JSON-lines file, or dataset on the Hub, with its configuration after a colon if it has
            several (`"owner/name:config"`); or `"reasoning_gym:task"`, whose tasks are its sources.
        split (`str`, *optional*, defaults to `"test"`):
            Split of a dataset on the Hub. One that has a single split gives that.
        columns (`dict[str, str]`, *optional*):
            Other columns to keep, `{name: column}`; and the columns of `prompt`, `solution` and `source`, where they
            are not found by their usual names.
        config (`dict` or `str`, *optional*):
            `dataset_config` of reasoning-gym's problems, as in [`~e3_trl.rewards.reasoning_gym.load_splits`].

    Returns:
        `pd.DataFrame`: `prompt` (text or messages), `solution` (the answer's text; absent if the dataset has none),
        `source` (the dataset's name where it says none), the other columns asked for, and the dataset's own.

    Raises:
        `ValueError`: if there is no such file, split or column, or if a problem or an answer is missing.
    """
    path = Path(name)
    if is_reasoning_gym(name):
        splits = load_splits(name, config, [split])
        if split not in splits:
            raise ValueError("test_size is 0 (dataset_config). Set it to 1 or more.")
        owner_name, dataset = name, splits[split].rename_column("task", "source")
    elif path.suffix in FILE_KINDS:
        if not path.is_file():
            raise ValueError(f"There is no file {name!r}. Check the path.")
        dataset = load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
    else:
        owner_name, _, config = name.partition(":")
        splits = load_dataset(owner_name, config or None)
        if split not in splits and len(splits) > 1:
            raise ValueError(
                f"{name!r} has the splits {list(splits)}, and no {split!r}. Save the right one as a file."
            )
        dataset = splits[split] if split in splits else next(iter(splits.values()))

    found = {column.lower(): column for column in reversed(dataset.column_names)}
    renamed = {}
    for key, usual in COLUMNS.items():
        column = next((found[candidate] for candidate in usual if candidate in found), None)
        if column is not None:
            renamed[key] = column
    renamed |= {key: column for key, column in (columns or {}).items() if column is not None}
    for key, column in {"prompt": "one of " + ", ".join(COLUMNS["prompt"]), **renamed}.items():
        if renamed.get(key) not in dataset.column_names:
            raise ValueError(
                f"{name!r} has no column {column!r} ({key}), only {dataset.column_names}. Name its column, or "
                "rename it."
            )
    # As objects, so that numbers of a column that is empty in another dataset stay what they are.
    own = {column: column for column in dataset.column_names}
    frame = pd.DataFrame({key: dataset[column][:] for key, column in (own | renamed).items()}, dtype=object)
    for key in ("prompt", "solution"):
        if key in frame and frame[key].isna().any():
            raise ValueError(f"{name!r} has no {key} in row {frame[key].isna().idxmax()}. Fill it in or drop the row.")
    if "solution" in frame:
        frame["solution"] = [_one_answer(answer, name) for answer in frame["solution"]]
    whole = path.stem if path.suffix in FILE_KINDS else owner_name.rsplit("/", 1)[-1]
    sources = frame["source"] if "source" in frame else [None] * len(frame)
    frame["source"] = [whole if source is None or source != source else str(source) for source in sources]  # or NaN
    return frame


def _one_answer(answer, name: str) -> str:
    """OlympiadBench has a list around each answer."""
    if isinstance(answer, str) or not hasattr(answer, "__len__"):
        return str(answer)
    if len(answer) != 1:
        raise ValueError(f"{name!r} has a row with {len(answer)} answers, {list(answer)!r}. Join them to one text.")
    return str(answer[0])


def join_problems(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all, with `None` where a dataset has no such column."""
    joined = pd.concat(frames, ignore_index=True)
    return joined.astype(object).where(joined.notna(), None)


def answers_for(reward_func: str, answers: list[str]) -> list[str]:
    """
    Answers as a reward function reads them: those of [`~e3_trl.rewards.REWARD_FUNCS`] as formulas, for math-verify,
    any other, and reasoning-gym's, as they stand.
    """
    for_math = reward_func in REWARD_FUNCS and not reward_func.startswith("reasoning_gym_")
    return [mark_answer(answer) for answer in answers] if for_math else list(answers)


def mark_answer(answer: str) -> str:
    r"""
    Mark a bare answer as a formula: math-verify reads LaTeX between delimiters only, and picks a number out of other
    text.

    Example:

    ```python
    >>> mark_answer(r"2\sqrt{5}")  # bare, it is read as 2
    '$2\\sqrt{5}$'
    >>> mark_answer(r"\boxed{7}"), mark_answer("none of these")
    ('\\boxed{7}', 'none of these')
    >>> mark_answer("5e-05")  # as Python writes a number; it is read as 5e - 5
    '$0.00005$'

    ```
    """
    answer = answer.strip()
    if _SCIENTIFIC.fullmatch(answer):
        answer = f"{Decimal(answer):f}"
    if _LATEX_DELIMITER.search(answer) or _WORDS.search(_TEXT_GROUP.sub("", answer)):
        return answer
    return f"${answer}$"


def problem_text(prompt: str | list[dict[str, str]]) -> str:
    """The problem itself: of a conversation, the last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def normalize_problem(prompt: str | list[dict[str, str]]) -> str:
    r"""
    What two writings of one problem have in common: without Unicode variants (NFKC), case, white space, `$`, the LaTeX
    that changes the looks alone, punctuation that is not inside a number, and a forum's markup. To compare, not to
    read.

    Example:

    ```python
    >>> normalize_problem("Find  $\\dfrac12 \\left( x \\right)$.") == normalize_problem("find \\(\\frac12(x)\\)")
    True

    ```
    """
    text = unicodedata.normalize("NFKC", problem_text(prompt)).casefold()
    text = _FORUM_TAG.sub("", _CREDIT.sub("", text)).replace("...", r"\dots ").replace(r"\%", "%")
    for one, others in _SYNONYMS.items():
        text = re.sub(rf"\\(?:{others})(?![a-z])", rf"\\{one}", text)
    text = re.sub(r"\\(?:text(?:it|bf|rm)?|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = _ALIGNED.sub(lambda match: match[1].replace("&", ""), text)
    text = re.sub(r"\s+", "", _LATEX_LOOKS.sub(" ", text))
    text = re.sub(r"(?<!\d)[.,:;]|[.,:;](?!\d)", "", text)
    text = re.sub(r"\\(overline|bar|hat|tilde|vec)\{(\w)_(\w|\{\w+\})\}", r"\\\1{\2}_\3", text)
    return re.sub(r"([_^])\{(\w|\\[a-z]+)\}", r"\1\2", text)
