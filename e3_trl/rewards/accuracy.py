"""Rewards for math problems, with TRL's verdicts, and safe for a run whatever the model writes."""

from collections.abc import Callable

from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from .. import dotted_path
from .reasoning_gym import check_installed, reasoning_gym_partial_reward, reasoning_gym_reward
from .worker_pool import Verdict, WorkerPool


_POOL = WorkerPool()
_THINK_END = "</think>"


def math_accuracy_reward(
    completions: list[list[dict[str, str]]] | list[str],
    solution: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    1 if a completion's answer equals the solution by math-verify, else 0, `None` if the solution cannot be parsed.

    The answer is the last `\boxed{}` wherever it stands, or else the LaTeX that follows words such as "the answer is".
    The verdicts are those of TRL's [`~trl.rewards.accuracy_reward`], for plain prompts as well as conversational ones.
    They come from worker processes ([`~e3_trl.rewards.worker_pool.WorkerPool`]), so that no completion can stop the
    run: one that takes more than 5 seconds or 1 GiB of memory, or that kills its worker, gets 0. A gold answer is
    parsed once per run by the worker that checks its completions (and by a worker that helps it out, or replaces it);
    if that takes more than 5 seconds twice, the reward is `None` for the rest of the run. The fraction of completions
    whose check was cut short, or their gold answer's, is logged as `rewards/math_accuracy_reward/unchecked`.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`): completions, one message or one text each.
        solution (`list[str]`): gold answer of each.
        log_extra (`callable`, *optional*): as TRL passes it, to add columns to the table of completions.
        log_metric (`callable`, *optional*): as TRL passes it, to log the fraction that could not be checked.
        **kwargs: what else TRL passes to a reward function.

    Returns:
        `list[float | None]`: one reward per completion.

    Example:

    ```python
    >>> math_accuracy_reward([r"So \boxed{\frac{1}{2}}", r"So \boxed{2}"], solution=["0.5", "0.5"])
    [1.0, 0.0]

    ```
    """
    verdicts = _POOL.check(_texts(completions), solution, describe=log_extra is not None)
    return _log(verdicts, solution, "math_accuracy_reward", log_extra, log_metric)


def math_reasoning_accuracy_reward(
    completions: list[list[dict[str, str]]] | list[str],
    solution: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    [`math_accuracy_reward`] of what follows the last `</think>`, 0 for a completion without one.

    The verdicts are those of TRL's [`~trl.rewards.reasoning_accuracy_reward`]. Arguments and limits are those of
    [`math_accuracy_reward`]; the fraction that could not be checked is
    `rewards/math_reasoning_accuracy_reward/unchecked`.

    Example:

    ```python
    >>> completions = [r"<think>\boxed{1}?</think> \boxed{2}", r"<think>Surely \boxed{2}"]
    >>> math_reasoning_accuracy_reward(completions, solution=["2", "2"])
    [1.0, 0.0]

    ```
    """
    texts = _texts(completions)
    finished = [index for index, text in enumerate(texts) if _THINK_END in text]
    verdicts = [Verdict(0.0, "[incomplete reasoning]", "[incomplete reasoning]") for _ in texts]
    checked = _POOL.check(
        [texts[index].rpartition(_THINK_END)[2] for index in finished],
        [gold for text, gold in zip(texts, solution, strict=True) if _THINK_END in text],
        describe=log_extra is not None,
    )
    for index, verdict in zip(finished, checked, strict=True):
        verdicts[index] = verdict
    return _log(verdicts, solution, "math_reasoning_accuracy_reward", log_extra, log_metric)


def _texts(completions: list[list[dict[str, str]]] | list[str]) -> list[str]:
    # A message that only calls a tool has no content.
    return [text if isinstance(text, str) else text[0]["content"] or "" for text in completions]


def _log(verdicts: list[Verdict], solution: list[str], name: str, log_extra, log_metric) -> list[float | None]:
    """Log what TRL's rewards log and the fraction that was not checked, and return the rewards."""
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [verdict.gold_parsed for verdict in verdicts])
        log_extra("answer_parsed", [verdict.answer_parsed for verdict in verdicts])
    if log_metric is not None and verdicts:
        log_metric(f"rewards/{name}/unchecked", sum(not verdict.checked for verdict in verdicts) / len(verdicts))
    return [verdict.reward for verdict in verdicts]


# By the names that recipes use.
REWARD_FUNCS = {
    func.__name__: func
    for func in (
        math_accuracy_reward,
        math_reasoning_accuracy_reward,
        accuracy_reward,
        reasoning_accuracy_reward,
        think_format_reward,
        reasoning_gym_reward,
        reasoning_gym_partial_reward,
    )
}


def load_reward_func(name: str) -> Callable:
    """
    A reward function of [`REWARD_FUNCS`], or by its dotted path, from the current folder too; `ValueError` if there is
    none, or what it needs is not installed.
    """
    if name.startswith("reasoning_gym_"):
        check_installed()
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    try:
        return dotted_path.load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"There is no reward function {name!r} ({error}). Choose one of {sorted(REWARD_FUNCS)}, or give the "
            "dotted path of a function, in reward_funcs (training) or reward_func (evaluation)."
        ) from error
