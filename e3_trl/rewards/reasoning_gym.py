"""
The problems of [reasoning-gym](https://github.com/open-thought/reasoning-gym), made to order, and rewards by its
scorers.
"""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict

from .worker_pool import WorkerPool


logger = logging.getLogger(__name__)

PACKAGE = "reasoning_gym"
WORKER = Path(__file__).with_name("reasoning_gym_worker.py")
_POOL = WorkerPool(script=WORKER, package=PACKAGE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def is_reasoning_gym(name: str) -> bool:
    """Whether a `dataset_name` asks for its problems: `reasoning_gym`, or `reasoning_gym:task,task`."""
    return name.partition(":")[0] == PACKAGE


def check_installed() -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(
            "reasoning-gym is not installed, and dataset_name or a reward function asks for it. Install it with `pip "
            "install 'e3-trl[reasoning_gym]'`."
        )


def reasoning_gym_dataset(
    tasks: str | list[str] | dict[str, dict],
    size: int = 500,
    seed: int = 0,
    split: str = "train",
    test_size: int = 100,
    instruction: str | None = None,
    **settings,
) -> Dataset:
    """
    Problems of reasoning-gym's tasks: the same for the same arguments, in any process.

    Args:
        tasks (`str`, `list[str]` or `dict[str, dict]`):
            A task, several in equal shares (also as `"number_sorting,chain_sum"`), or several with their settings,
            among which `weight` is its share: `{"number_sorting": {"weight": 2, "min_numbers": 3}, "chain_sum": {}}`.
        size (`int`, *optional*, defaults to `500`):
            Number of problems for training. No question comes twice; of a task that has not as many, there are fewer,
            which a warning says.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems. Those of two seeds have nothing to do with each other.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, or `"test"`, whose questions are none of those.
        test_size (`int`, *optional*, defaults to `100`):
            Number of problems in the test split.
        instruction (`str`, *optional*):
            What each question ends with: how to answer, above all.
        **settings:
            Of the task, if there is one alone.

    Returns:
        `Dataset`: with `prompt` (a user's message), `solution` (an answer; empty where the task has none to show),
        `task`, and `entry`, which [`reasoning_gym_reward`] reads.

    Raises:
        `ValueError`: if reasoning-gym is not installed, or has no such task or setting.
    """
    return _make(
        tasks, [split], size=size, seed=seed, test_size=test_size, instruction=instruction, settings=settings
    )[split]


def load_splits(name: str, config: dict | str | None, splits: list[str]) -> DatasetDict:
    """
    The splits that a recipe's `dataset_name` and `dataset_config` describe; without a test split if `test_size` is 0.

    Args:
        name (`str`): `reasoning_gym:task`, with several tasks `reasoning_gym:task,task`, or `reasoning_gym`.
        config (`dict`, `str` or `None`): the arguments of [`reasoning_gym_dataset`], or the same as JSON. `tasks` is
            among them if the name has none.
        splits (`list[str]`): which of `train` and `test` to make.
    """
    if isinstance(config, str):
        with suppress(yaml.YAMLError):
            config = yaml.safe_load(config)  # to which JSON belongs
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"dataset_config is {config!r}. Set it to a mapping, such as {{size: 500, seed: 0}}.")
    settings = dict(config or {})
    tasks = name.partition(":")[2]
    if bool(tasks) == ("tasks" in settings):
        raise ValueError(
            f"dataset_name is {name!r}, and dataset_config has {'' if tasks else 'no '}tasks. Name them in one of the "
            "two: reasoning_gym:number_sorting, or tasks: {number_sorting: {}}."
        )
    tasks = tasks or settings.pop("tasks")
    arguments = {"size": 500, "seed": 0, "test_size": 100, "instruction": None}
    arguments |= {name: settings.pop(name) for name in arguments if name in settings}
    if arguments["test_size"] == 0:
        splits = [split for split in splits if split != "test"]
    return _make(tasks, splits, settings=settings, **arguments)


def _make(tasks, splits, *, size, seed, test_size, instruction, settings) -> DatasetDict:
    check_installed()
    for name, value, least in (("size", size, 1), ("test_size", test_size, 0), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r} (dataset_config). Set it to {least} or more.")
    if not set(splits) <= {"train", "test"}:
        raise ValueError(f"split is {splits[0]!r}. Set it to 'train' or 'test'.")
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction is {instruction!r} (dataset_config). Set it to a text.")
    by_task = _settings_by_task(tasks, settings)
    weights = [of_task.pop("weight", 1) for of_task in by_task.values()]
    for task, weight in zip(by_task, weights, strict=True):
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"weight is {weight!r} for the task {task!r} (dataset_config). Set it above 0.")
    wanted = {"train": _shares(size, weights), "test": _shares(test_size, weights)}
    order = {
        "seed": seed,
        "splits": splits,
        "tasks": {
            task: {"settings": of_task, **{split: shares[index] for split, shares in wanted.items()}}
            for index, (task, of_task) in enumerate(by_task.items())
        },
    }
    made = _run_worker(order)
    for split in splits:
        for task, of_task in order["tasks"].items():
            found = sum(row["task"] == task for row in made[split])
            if found < of_task[split]:
                logger.warning(
                    f"The task {task!r} gives {found} different problems for the {split} split, and {of_task[split]} "
                    "were asked for (size, test_size)."
                )
        if not made[split]:
            raise ValueError(
                f"size is {size} and test_size {test_size} (dataset_config), and nothing is left for the {split} "
                "split. Raise that one, lower the other, or have the task's settings allow more problems."
            )
    return DatasetDict({split: _dataset(made[split], instruction) for split in splits})


def _settings_by_task(tasks: str | list[str] | dict[str, dict], settings: dict) -> dict[str, dict]:
    """The settings of each task, copies, `weight` among them."""
    if isinstance(tasks, str):
        tasks = [task.strip() for task in tasks.split(",")]
    if isinstance(tasks, list | tuple):
        tasks = dict.fromkeys(tasks)
    if not tasks or not isinstance(tasks, dict) or not all(isinstance(one, dict | None) for one in tasks.values()):
        raise ValueError(
            f"tasks is {tasks!r} (dataset_config). Set it to names of tasks, or to a mapping of each to its settings."
        )
    by_task = {task: dict(of_task or {}) for task, of_task in tasks.items()}
    if settings and len(by_task) > 1:
        raise ValueError(
            f"dataset_config sets {sorted(settings)}, and there are the tasks {list(by_task)}. Set them for one: "
            f"tasks: {{{next(iter(by_task))}: {{{next(iter(settings))}: ...}}}}."
        )
    for of_task in by_task.values():
        of_task |= settings
    return by_task


def _shares(size: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights, of sum `size`."""
    ends = [round(size * sum(weights[: index + 1]) / sum(weights)) for index in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _run_worker(order: dict) -> dict[str, list[dict]]:
    done = subprocess.run(
        [sys.executable, str(WORKER), "make"],
        input=json.dumps(order),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        # What tasks draw can depend on the order of a set: the same problems in every process of every run.
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"The process that makes reasoning-gym's problems ended with code {done.returncode}. Its message stands "
            "above."
        )
    made = json.loads(done.stdout)
    if "mistake" in made:
        raise ValueError(made["mistake"])
    return made


def _dataset(rows: list[dict], instruction: str | None) -> Dataset:
    end = "" if instruction is None else f"\n\n{instruction}"
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["question"].rstrip() + end}] for row in rows],
            "solution": [row["answer"] for row in rows],
            "task": [row["task"] for row in rows],
            "entry": [row["entry"] for row in rows],
        }
    )


def reasoning_gym_reward(
    completions: list[list[dict[str, str]]] | list[str],
    entry: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """
    1 if the task's scorer gives a completion's answer the full score, else 0; [`reasoning_gym_partial_reward`] is what
    it gives.

    The answer is what the last `<answer>...</answer>` holds, else what follows the last "Answer:", else the whole
    completion. Scorers run in processes of their own ([`~e3_trl.rewards.worker_pool.WorkerPool`]), for some evaluate
    what the model wrote: an answer at which one raises, or takes more than 5 seconds or 1 GiB of memory, gets 0. That
    keeps the run going; it is no sandbox. The fraction that was cut short is logged as
    `rewards/reasoning_gym_reward/unchecked`.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`): completions, one message or one text each.
        entry (`list[str]`): the column of [`reasoning_gym_dataset`].
        log_extra (`callable`, *optional*): as TRL passes it, to add columns to the table of completions.
        log_metric (`callable`, *optional*): as TRL passes it, to log the fraction that could not be checked.
        **kwargs: what else TRL passes to a reward function.

    Returns:
        `list[float | None]`: one reward per completion, `None` for an entry that no scorer of reasoning-gym reads.
    """
    scores = _score(completions, entry, "reasoning_gym_reward", log_extra, log_metric)
    return [None if score is None else float(score >= 1) for score in scores]


def reasoning_gym_partial_reward(
    completions: list[list[dict[str, str]]] | list[str],
    entry: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """What the task's scorer gives, from 0 to 1; the rest is as in [`reasoning_gym_reward`]."""
    return _score(completions, entry, "reasoning_gym_partial_reward", log_extra, log_metric)


def extract_answer(completion: str) -> str:
    """
    What is scored of a completion.

    Example:

    ```python
    >>> extract_answer("<answer>1</answer>, no: <answer> 2 </answer>. Answer: 3")
    '2'
    >>> extract_answer("So. Answer: 3"), extract_answer(" 4")
    ('3', '4')

    ```
    """
    blocks = _ANSWER.findall(completion)
    return (blocks[-1] if blocks else completion.rpartition("Answer:")[2]).strip()


def _score(completions, entry: list[str], name: str, log_extra, log_metric) -> list[float | None]:
    check_installed()
    # A message that only calls a tool has no content.
    texts = [text if isinstance(text, str) else text[0]["content"] or "" for text in completions]
    answers = [extract_answer(text) for text in texts]
    verdicts = _POOL.check(answers, entry)
    if log_extra is not None:
        log_extra("answer", answers)
    if log_metric is not None and verdicts:
        log_metric(f"rewards/{name}/unchecked", sum(not verdict.checked for verdict in verdicts) / len(verdicts))
    return [verdict.reward for verdict in verdicts]
