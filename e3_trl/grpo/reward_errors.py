"""A reward function that raises: said with what it was given, by all processes together, and nothing is lost by it."""

import functools
import time
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from ..runs.lifecycle import RunCannotGoOn


SEARCH_SECONDS = 30  # for the row that a function raised for, while the other processes wait


class RewardError(RunCannotGoOn, RuntimeError):
    """A reward function raised; on all processes together, so that none waits for another, and the run can save."""


class RewardGuard:
    """
    Keeps the exceptions of reward functions until all processes are at a place where they can be told of them.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer, whose reward functions it stands before.
    """

    def __init__(self, trainer):
        self._error: Exception | None = None
        self._message: str | None = None
        names = zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
        trainer.reward_funcs = [
            func if isinstance(func, torch.nn.Module) else self._guarded(func, name) for func, name in names
        ]

    def raise_errors(self) -> None:
        """Raise [`RewardError`] on all processes if a reward function raised on one of them."""
        error, self._error = self._error, None
        message, self._message = self._message, None
        messages = [message for message in gather_object([message]) if message is not None]
        if messages:
            raise RewardError(messages[0]) from error

    def _guarded(self, func: Callable, name: str) -> Callable:
        if is_async_callable(func):

            @functools.wraps(func)
            async def guarded(prompts, completions, **kwargs):
                try:
                    return _checked(await func(prompts=prompts, completions=completions, **kwargs), len(prompts))
                except Exception as error:
                    self._note(error, name, f"one of {len(prompts)} completions")
                    return [None] * len(prompts)

        else:

            @functools.wraps(func)
            def guarded(prompts, completions, **kwargs):
                try:
                    return _checked(func(prompts=prompts, completions=completions, **kwargs), len(prompts))
                except Exception as error:
                    self._note(error, name, _first_that_raises(func, prompts, completions, kwargs))
                    return [None] * len(prompts)

        return guarded

    def _note(self, error: Exception, name: str, what: str) -> None:
        self._error = error
        self._message = (
            f"Reward function {name!r} raised {type(error).__name__}: {error}, for {what}. Mend it, then run the same "
            "command again."
        )


def _checked(rewards, number: int) -> list:
    """The rewards as a list; raises what TRL would raise for them, on one process alone."""
    rewards = list(rewards)
    if len(rewards) != number:
        raise ValueError(f"it returned {len(rewards)} rewards, and not one for each of the {number} completions")
    torch.tensor([torch.nan if reward is None else reward for reward in rewards], dtype=torch.float32)
    return rewards


def _first_that_raises(func: Callable, prompts: list, completions: list, kwargs: dict) -> str:
    """The first row that it raises for if it gets that one alone, if it is found in time."""
    begin = time.monotonic()
    for row in range(len(prompts)):
        if time.monotonic() - begin > SEARCH_SECONDS:
            return f"one of {len(prompts)} completions"
        columns = {
            name: value[row : row + 1] if isinstance(value, list) and len(value) == len(prompts) else value
            for name, value in kwargs.items()
        }
        try:
            _checked(func(prompts=prompts[row : row + 1], completions=completions[row : row + 1], **columns), 1)
        except Exception:
            return f"row {row} of {len(prompts)}, prompt {_short(prompts[row])}, completion {_short(completions[row])}"
    return f"{len(prompts)} completions together, and for none of them alone"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
