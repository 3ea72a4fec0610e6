"""What a reward function is given."""

import inspect
from collections.abc import Callable

from trl.trainer.utils import get_callable_name


# What TRL passes to every reward function besides the columns of the dataset.
REWARD_ARGUMENTS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"
}  # fmt: skip


def check_reward_columns(func: Callable, columns: list[str], arguments: set[str] = REWARD_ARGUMENTS) -> None:
    """
    Raise `ValueError` if a reward function asks for a column that the data have not.

    Args:
        func (`Callable`): the reward function.
        columns (`list[str]`): of the data.
        arguments (`set[str]`, *optional*): what it is given besides. In training TRL's.
    """
    for parameter in inspect.signature(func).parameters.values():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in arguments | set(columns):
            raise ValueError(
                f"Reward function {get_callable_name(func)!r} needs a column {parameter.name!r}, but the dataset has "
                f"only {list(columns)}. Add or rename the column, or choose another reward function."
            )
