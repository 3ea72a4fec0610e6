"""
Two ladders of problems from reasoning-gym, each with rungs from what the model solves to what it hardly ever does.

`Slips`: numbers to sort. There is one way to do it, and what is uncertain is whether it slips.
`Ways`: sums of numbers of two digits. The model is taught to answer at once, and now and then to write running
totals: the rare way is the right one where the sum is long.
"""

import json
import os
import random
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import reasoning_gym

from e3_trl.rewards.reasoning_gym import reasoning_gym_reward
from recipes.quickstart.prepare import write_jsonl

from .sampling import sample


# Where prepare.py puts the warmed models, each beside the file with its measured rates.
OUTPUT, RATES = "outputs/SmolLM2-135M", "rates.json"
# The template's own system message takes 16 more tokens of every row, a third of it.
SYSTEM = {"role": "system", "content": ""}
# A problem belongs to one part, by its text and whatever the seed: what was taught, or is trained on, is never tested.
PARTS = ("lessons", "rates", "test", "train")


class Lesson(NamedTuple):
    """A conversation of which the assistant's `text` is learned, but for the part that is `given`."""

    prompt: list[dict[str, str]]
    given: str
    text: str


def part_of(question: str) -> str:
    return PARTS[zlib.crc32(question.encode()) % len(PARTS)]


class Ladder:
    """
    Args:
        seed (`int`, *optional*, defaults to 0): of the problems.

    Attributes:
        name (`str`): of the ladder.
        task (`str`): reasoning-gym's.
        levels (`tuple[str, ...]`): the rungs, easiest first.
        taught (`tuple[str, ...]`): rungs of the lessons.
        steps, lessons_per_step (`int`): of the warm-up.
        learning_rate (`float`): of the warm-up, at its highest.
        max_completion_length (`int`): room for the longest right completion, in tokens.
    """

    name: str
    task: str
    levels: tuple[str, ...]
    taught: tuple[str, ...]
    steps: int
    lessons_per_step = 8
    learning_rate = 2e-4
    max_completion_length: int
    reward = staticmethod(reasoning_gym_reward)
    sample = staticmethod(sample)

    def __init__(self, seed: int = 0):
        self.seed = seed

    def settings(self, level: str) -> dict:
        """reasoning-gym's, for one rung."""
        raise NotImplementedError

    def question(self, entry: dict) -> str | None:
        """As the model is asked; `None` for what is not on this ladder."""
        raise NotImplementedError

    def lesson(self, entry: dict, rng: random.Random) -> tuple[str, str]:
        """What is given and what is learned of a solution."""
        raise NotImplementedError

    def writes_it_out(self, completion: str) -> bool:
        """Whether a completion is of the longer way, if there is one."""
        return "Answer:" in completion

    def entries(self, part: str, level: str) -> Iterator[tuple[str, dict]]:
        """Without end, distinct questions of one part and their entries."""
        first = random.Random(f"{self.seed} {self.name} {part} {level}").randrange(2**31)
        entries = reasoning_gym.create_dataset(self.task, seed=first, size=2**31, **self.settings(level))
        seen = set()
        for entry in entries:
            question = self.question(entry)
            if question is not None and question not in seen and part_of(question) == part:
                seen.add(question)
                yield question, entry

    def problems(self, part: str, per_level: int) -> list[dict]:
        """`per_level` problems of each rung, with the columns of `e3_trl.reasoning_gym_dataset` and their `level`."""
        rows = []
        for level in self.levels:
            for _, (question, entry) in zip(range(per_level), self.entries(part, level), strict=False):
                rows.append(
                    {
                        "prompt": [SYSTEM, {"role": "user", "content": question}],
                        "task": self.task,
                        "entry": json.dumps({"task": self.task, "settings": self.settings(level), **entry}),
                        "solution": entry["answer"],
                        "level": level,
                    }
                )
        return rows

    def lessons(self, count: int) -> Iterator[Lesson]:
        """`count` lessons, of the easy rungs in turn."""
        rng = random.Random(f"{self.seed} {self.name}")
        entries = [self.entries("lessons", level) for level in self.taught]
        for index in range(count):
            question, entry = next(entries[index % len(entries)])
            yield Lesson([SYSTEM, {"role": "user", "content": question}], *self.lesson(entry, rng))

    def write_problems(self, folder: Path, rates: dict, counts: dict[str, int]) -> None:
        """`train.jsonl`, with a `difficulty` of 1 - the rate of the problem's rung, and `test.jsonl`."""
        train = self.problems("train", counts["train"])
        write_jsonl(folder / "train.jsonl", [row | {"difficulty": 1 - rates[row["level"]]["solved"]} for row in train])
        write_jsonl(folder / "test.jsonl", self.problems("test", counts["test"]))

    def make_base(self, folder: Path, seed: int, steps: None, problems: dict[str, int]) -> None:
        """
        For the study: the warmed model, which all seeds share, beside problems of this seed.

        Raises:
            `FileNotFoundError`: if it has not been made.
        """
        source = Path(OUTPUT) / self.name
        if not (source / RATES).exists():
            raise FileNotFoundError(f"{source} is not there. Make it: python -m recipes.SmolLM2-135M.prepare")
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.suffix != ".jsonl" and path.is_file() and not (folder / path.name).exists():
                os.link(path, folder / path.name)
        self.write_problems(folder, json.loads((source / RATES).read_text()), problems)


class Slips(Ladder):
    """3 to 7 numbers of 0 to 99, ascending: `[7, 25, 56]`, which reasoning-gym's scorer takes as it takes strings."""

    name = "slips"
    task = "number_sorting"
    levels = ("3", "4", "5", "6", "7")
    taught = ("3", "4")
    steps = 60
    max_completion_length = 32

    def settings(self, level):
        numbers = {"min_numbers": int(level), "max_numbers": int(level)}
        return numbers | {"min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99}

    def question(self, entry):
        if entry["metadata"]["direction"] != "ascending":
            return None
        numbers = ", ".join(str(int(float(number))) for number in entry["metadata"]["original_numbers"])
        return f"Sort these numbers in ascending order: {numbers}"

    def lesson(self, entry, rng):
        return "", json.dumps([int(float(number)) for number in entry["metadata"]["sorted_numbers"]])


class Ways(Ladder):
    """
    Sums of 2 to 6 numbers of two digits. `42 + 25 + 73 =` is answered at once, `140`, or with running totals, one per
    line, and then the answer: `42`, `67`, `140`, `Answer: 140`. Two of five lessons teach which of the two to begin
    with, and how to end; the others how totals go on, once the first is there.

    With 200 steps, sums of up to 4 and totals in one of twenty, totals were begun in less than 1 of 100 answers, and
    those of 5 numbers never came out right: hence more of each.
    """

    name = "ways"
    task = "chain_sum"
    levels = ("2", "3", "4", "5", "6")
    taught = ("2", "3", "4", "5", "6")
    steps = 320
    max_completion_length = 32
    share_of_totals = 1 / 8

    def settings(self, level):
        return {"min_terms": int(level), "max_terms": int(level), "min_digits": 2, "max_digits": 2}

    def question(self, entry):
        expression = entry["metadata"]["expression"]
        return None if "-" in expression else f"{expression} ="

    def lesson(self, entry, rng):
        first, *totals = accumulate(int(number) for number in entry["metadata"]["expression"].split(" + "))
        written = "\n".join(map(str, totals)) + f"\nAnswer: {totals[-1]}"
        if rng.random() < 0.6:
            return f"{first}\n", written
        return "", f"{first}\n{written}" if rng.random() < self.share_of_totals else str(totals[-1])


LADDERS = {ladder.name: ladder for ladder in (Slips, Ways)}
