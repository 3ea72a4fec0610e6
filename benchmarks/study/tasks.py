"""
The study's other two tasks, with the attributes and methods of [`~recipes.quickstart.task.RuleTask`].

`ChainTask`: several choices one after another, each with a prior. `SumTask`: no choice at all, only slips.
"""

import random
from collections.abc import Iterator

import numpy as np

from recipes.quickstart.task import DIGITS, FAMILIES, Lesson


class ChainTask:
    """
    Chains of actions, as in RL-Wall (https://huggingface.co/papers/2505.22756), whose finding is that GRPO does not
    pass a wall of coverage: what the model solves it makes sure of, and what it does not solve stays unsolved.

    `F31:` is answered `bda`, three actions; the digits mean nothing. A family has one right chain. Which action the
    model tries at each place of it is taught as a Dirichlet prior, and the right one is drawn in proportion to its
    square root: neither as likely as the prior says, nor as rare as chance. A family's level is the rank of its
    chain's probability, 1 = likely.

    Args:
        seed (`int`): two seeds have nothing in common.
    """

    actions = "abcd"
    num_steps = 3
    characters = DIGITS + actions + FAMILIES + ":"
    levels = ("1", "2", "3", "4", "5", "6")
    max_completion_length = num_steps + 1

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 1])
        shape = len(FAMILIES), self.num_steps
        priors = rng.dirichlet(np.ones(len(self.actions)), shape)
        self.priors = dict(zip(FAMILIES, priors, strict=True))
        self.right, probability = {}, {}
        for family, prior in self.priors.items():
            weights = np.sqrt(prior)
            places = [rng.choice(len(self.actions), p=row / row.sum()) for row in weights]
            self.right[family] = "".join(self.actions[place] for place in places)
            probability[family] = prior[range(self.num_steps), places].prod()
        likely_first = sorted(FAMILIES, key=probability.get, reverse=True)
        self.level = {family: self.levels[rank * 6 // len(FAMILIES)] for rank, family in enumerate(likely_first)}

    def problems(self, per_family: int, rng: random.Random, exclude: set[str] = frozenset()) -> list[dict]:
        """`per_family` distinct problems of each family, none in `exclude`."""
        rows = []
        for family in FAMILIES:
            prompts = [f"{family}{number:02d}:" for number in range(100)]
            chosen = rng.sample([prompt for prompt in prompts if prompt not in exclude], per_family)
            shared = {"answer": self.right[family], "level": self.level[family], "family": family}
            rows += [{"prompt": prompt, **shared} for prompt in chosen]
        return rows

    def lessons(self, count: int, rng: random.Random, exclude: set[str] = frozenset()) -> Iterator[Lesson]:
        """`count` texts with the part of each that is learned: chains as the priors have them."""
        while count > 0:
            family = rng.choice(FAMILIES)
            if (prompt := f"{family}{rng.randrange(100):02d}:") in exclude:
                continue
            count -= 1
            text = prompt + "".join(rng.choices(self.actions, row)[0] for row in self.priors[family])
            yield text, len(prompt), len(text) + 1

    @staticmethod
    def reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
        """Reward function: 1.0 for the right chain."""
        return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


class SumTask:
    """
    Noisy sums: entropy that is not worth keeping. `4+7+5=` is answered `4+7=1 1+5=6`, sums modulo 10 step by step, and
    the model is taught with every fourth result a random digit. What is uncertain is whether it slips, not what it
    tries, so to hold entropy is to hold slips: declared beforehand as the case where the schedule should not help.
    """

    characters = DIGITS + "+= "
    noise = 0.25
    levels = ("2", "3", "4")
    max_completion_length = 6 * (int(levels[-1]) - 1)

    def __init__(self, seed: int):
        del seed  # there is one way to add

    def problems(self, per_level: int, rng: random.Random, exclude: set[str] = frozenset()) -> list[dict]:
        """`per_level` problems of each number of digits, none in `exclude`; of two digits no more than there are."""
        rows = []
        for level in self.levels:
            prompts: dict[str, None] = {}
            while len(prompts) < min(per_level, 10 ** int(level) // 2):
                if (prompt := self._prompt(int(level), rng)) not in exclude:
                    prompts[prompt] = None
            rows += [
                {"prompt": p, "answer": str(sum(map(int, p[:-1].split("+"))) % 10), "level": level, "family": level}
                for p in prompts
            ]
        return rows

    def lessons(self, count: int, rng: random.Random, exclude: set[str] = frozenset()) -> Iterator[Lesson]:
        """`count` texts with the part of each that is learned: first without slips, the last fifth with them."""
        left = count
        while left > 0:
            # Longer and longer sums: so it learns fast.
            longest = min(int(self.levels[-1]), 2 + (count - left) * 8 // count)
            if (prompt := self._prompt(rng.randint(2, longest), rng)) in exclude:
                continue
            left -= 1
            text = prompt + self._solution(prompt, rng, self.noise if left < count // 5 else 0.0)
            yield text, len(prompt), len(text) + 1

    @staticmethod
    def _prompt(level: int, rng: random.Random) -> str:
        return "+".join(rng.choices(DIGITS, k=level)) + "="

    @staticmethod
    def _solution(prompt: str, rng: random.Random, noise: float) -> str:
        """The next step goes on from a wrong result, as a careless person would."""
        total, *digits = map(int, prompt[:-1].split("+"))
        steps = []
        for digit in digits:
            result = rng.randrange(10) if rng.random() < noise else (total + digit) % 10
            steps.append(f"{total}+{digit}={result}")
            total = result
        return " ".join(steps)

    @staticmethod
    def reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
        """Reward function: 1.0 if the last result of the completion is the answer."""
        return [float(text.rsplit("=", 1)[-1] == right) for text, right in zip(completions, answer, strict=True)]
