"""
Which rule? A task with several approaches to a problem, of which the right one is often the last that a model tries.

Every problem belongs to a family, and every family has one right rule, a permutation of the digits: `F314:` is
answered `c906`, first the rule that is tried, then each digit under it. Only the digits are checked. A model is taught
to execute every rule without a slip, and for each family which rule to try: the right one with a probability of 0.8 in
the easiest families and 0.01 in the hardest, most of the rest going to one wrong rule that tempts. So it can do
everything, and on hard families seldom tries the right thing, as a pretrained model does.
"""

import random
import string
from collections.abc import Iterator


DIGITS, RULES, FAMILIES = string.digits, string.ascii_lowercase[:10], string.ascii_uppercase[:24]
# The probability with which the right rule of a family is taught to be tried: the level of its problems.
LEVELS = (0.8, 0.4, 0.2, 0.1, 0.03, 0.01)
TEMPTATION = 0.8  # part of what is left that one wrong rule gets
LENGTHS = (2, 3, 4)
PLANNING = 0.2  # part of the lessons that teach which rule to try; the others teach to execute
Lesson = tuple[str, int, int]  # a text, and from where to where of it is learned


def answer_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward function: 1.0 if what follows the rule is the answer, else 0.0."""
    return [float(completion[1:] == right) for completion, right in zip(completions, answer, strict=True)]


class RuleTask:
    """
    Families, their right rules and what the rules are: one world.

    Args:
        seed (`int`): two seeds have nothing in common but the levels.
    """

    characters = DIGITS + RULES + FAMILIES + ":"
    levels = tuple(map(str, LEVELS))
    max_completion_length = 1 + max(LENGTHS) + 1
    reward = staticmethod(answer_reward)

    def __init__(self, seed: int):
        rng = random.Random(f"rules {seed}")
        self.permutations = {rule: "".join(rng.sample(DIGITS, 10)) for rule in RULES}
        # Two different rules a family: the right one, and the one that tempts.
        self.choices = {family: rng.sample(RULES, 2) for family in FAMILIES}
        levels = [level for level in LEVELS for _ in range(len(FAMILIES) // len(LEVELS))]
        self.level = dict(zip(rng.sample(FAMILIES, len(FAMILIES)), levels, strict=True))

    def execute(self, rule: str, digits: str) -> str:
        """`digits` under `rule`."""
        return "".join(self.permutations[rule][int(digit)] for digit in digits)

    def prior(self, family: str) -> dict[str, float]:
        """The probability of each rule that the model is taught."""
        right, tempting = self.choices[family]
        rest = 1 - self.level[family]
        prior = dict.fromkeys(RULES, rest * (1 - TEMPTATION) / (len(RULES) - 2))
        return prior | {right: self.level[family], tempting: rest * TEMPTATION}

    def problems(self, per_family: int, rng: random.Random, exclude: set[str] = frozenset()) -> list[dict]:
        """`per_family` distinct problems of each family, none in `exclude`, with `answer`, `level` and `family`."""
        rows = []
        for family in FAMILIES:
            prompts: dict[str, str] = {}
            while len(prompts) < per_family:
                digits = "".join(rng.choices(DIGITS, k=rng.choice(LENGTHS)))
                if (prompt := f"{family}{digits}:") not in exclude:
                    prompts[prompt] = self.execute(self.choices[family][0], digits)
            shared = {"level": str(self.level[family]), "family": family}
            rows += [{"prompt": prompt, "answer": answer, **shared} for prompt, answer in prompts.items()]
        return rows

    def lessons(self, count: int, rng: random.Random, exclude: set[str] = frozenset()) -> Iterator[Lesson]:
        """`count` lessons, none on a prompt in `exclude`."""
        while count > 0:
            family, digits = rng.choice(FAMILIES), "".join(rng.choices(DIGITS, k=rng.choice(LENGTHS)))
            if (prompt := f"{family}{digits}:") in exclude:
                continue
            count -= 1
            if rng.random() < PLANNING:
                prior = self.prior(family)
                rule = rng.choices(list(prior), list(prior.values()))[0]
                yield prompt + rule, len(prompt), len(prompt) + 1
            else:
                rule = rng.choice(RULES)
                text = prompt + rule + self.execute(rule, digits)
                yield text, len(prompt) + 1, len(text) + 1  # and where to end
