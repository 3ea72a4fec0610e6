"""Graded arithmetic: sums modulo 10, solved step by step. The level of a problem is its number of digits."""

import random


LEVELS = range(2, 9)
CHARACTERS = "0123456789+= "


def make_prompts(level: int, count: int, rng: random.Random, exclude: set[str] = frozenset()) -> list[str]:
    """`count` distinct prompts of `level` digits such as `"4+7+5="`, none of them in `exclude`."""
    excluded = sum(prompt.count("+") == level - 1 for prompt in exclude)
    if count > 10**level - excluded:
        raise ValueError(f"There are no {count} distinct prompts of {level} digits beside the {excluded} excluded.")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompt = "+".join(rng.choices("0123456789", k=level)) + "="
        if prompt not in exclude:
            prompts[prompt] = None
    return list(prompts)


def make_problems(per_level: int, rng: random.Random, exclude: set[str] = frozenset()) -> list[dict[str, str | int]]:
    """`per_level` distinct problems of each level, none in `exclude`: rows of `prompt`, `answer` and `level`."""
    return [
        {"prompt": prompt, "answer": str(sum(read_digits(prompt)) % 10), "level": level}
        for level in LEVELS
        for prompt in make_prompts(level, per_level, rng, exclude)
    ]


def read_digits(prompt: str) -> list[int]:
    """`"4+7+5="` -> `[4, 7, 5]`."""
    return [int(digit) for digit in prompt.rstrip("=").split("+")]


def write_solution(prompt: str, rng: random.Random, noise: float = 0.0) -> str:
    """
    Worked solution: `"4+7+5="` -> `"4+7=1 1+5=6"`.

    With probability `noise` the result of a step is a random digit. The next step goes on from that result, as a
    careless person would.
    """
    total, *digits = read_digits(prompt)
    steps = []
    for digit in digits:
        result = rng.randrange(10) if rng.random() < noise else (total + digit) % 10
        steps.append(f"{total}+{digit}={result}")
        total = result
    return " ".join(steps)


def exact_answer_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward function: 1.0 if the last result of the completion is the answer, else 0.0."""
    return [
        float(completion.rsplit("=", 1)[-1] == right) for completion, right in zip(completions, answer, strict=True)
    ]
