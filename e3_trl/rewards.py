"""Rewards for math problems."""

from trl.rewards import accuracy_reward


def math_accuracy_reward(
    completions: list[list[dict[str, str]]] | list[str], solution: list[str], **kwargs
) -> list[float | None]:
    """
    1 if a completion's answer equals the solution by math-verify, else 0, `None` if the solution cannot be parsed.

    TRL's [`~trl.rewards.accuracy_reward`], for plain prompts as well as conversational ones.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`): completions, one message or one text each.
        solution (`list[str]`): gold answer of each.
        **kwargs: what else TRL passes to a reward function.

    Returns:
        `list[float | None]`: one reward per completion.
    """
    messages = [[{"content": text}] if isinstance(text, str) else text for text in completions]
    return accuracy_reward(messages, solution, **kwargs)
