"""
A process that has reasoning-gym make problems (`python reasoning_gym_worker.py make`) or score answers.

[`~e3_trl.rewards.reasoning_gym`] runs this file by its path, and it imports nothing of e3_trl. Problems are made here
for their sake: six tasks take them from the order of a set, which differs from process to process unless
`PYTHONHASHSEED` is set before it starts. Answers are scored here for the run's sake: some scorers evaluate what the
model wrote.
"""

import os
import sys


# Python puts the folder of a file that it runs first on the path, where our reasoning_gym.py would hide the package.
if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

import difflib
import json
import logging
import random
import re
import runpy
import threading
from collections.abc import Iterator
from dataclasses import fields
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset


MAX_ROUNDS = 10
# Each compares a board with one of tuples, which JSON makes lists of.
BOARDS_OF_TUPLES = ("arc_agi", "rearc")


# What a right answer meets besides, where the scorer (of 0.1.25) gives the full score to wrong ones as well.
ALSO_REQUIRED = {
    # Probabilities of which one begins as the other: 0 and 0.25.
    "coin_flip": lambda answer, entry: abs(Fraction(answer) - Fraction(entry["answer"])) <= 1e-4,
    "complex_arithmetic": lambda answer, entry: "nan" not in answer.lower(),
    # Any text.
    "game_of_life_halting": lambda answer, entry: answer == entry["answer"],
    # The 24 of other numbers than the question's.
    "puzzle24": lambda answer, entry: (
        sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])
    ),
}


class Mistake(Exception):
    """Of the user's, with the message."""


def near(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def create(task: str, settings: dict, seed: int, size: int) -> ProceduralDataset:
    """A dataset of reasoning-gym's; `Mistake` if there is no such task or setting, or it may not have that value."""
    names = sorted(DATASETS.keys() - {"composite"})  # several tasks have shares of their own here
    if task not in names:
        raise Mistake(
            f"dataset_name names the task {task!r}, and reasoning_gym has none of that name.{near(task, names)} It "
            f"has {', '.join(names)}."
        )
    known = sorted({field.name for field in fields(DATASETS[task][1])} - {"seed", "size"})
    for name in settings:
        if name not in known:
            raise Mistake(
                f"dataset_config sets {name!r}, and the task {task!r} has no such setting.{near(name, known)} It has "
                f"{', '.join(known)}."
            )
    try:
        return create_dataset(task, seed=seed, size=size, **settings)
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise unfit(task, settings, error) from error


def unfit(task: str, settings: dict, error: Exception) -> Mistake:
    reason = str(error) or type(error).__name__
    return Mistake(f"dataset_config sets {settings} for the task {task!r}, which takes other values: {reason}.")


def draw(task: str, settings: dict, seed: str, wanted: int, seen: set[str]) -> Iterator[dict]:
    """Problems that are not among the questions `seen`, `wanted` of them, or fewer if the task has no more."""
    found = 0
    if wanted == 0:
        return
    for round_ in range(MAX_ROUNDS):
        # The task adds the index of a problem to its seed: those of two seeds that are near are the same but for a
        # few.
        number = random.Random(f"{seed} {task} {round_}").getrandbits(31)
        random.seed(number)  # a few tasks draw from these
        np.random.seed(number)
        dataset, before = create(task, settings, number, wanted), found
        for index in range(wanted):
            if found == wanted:
                return
            try:
                entry = dataset[index]
            except IndexError:  # of a task that has no more
                break
            except (AssertionError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise unfit(task, settings, error) from error
            if entry["question"] not in seen:
                seen.add(entry["question"])
                found += 1
                yield entry
        if found == before:
            return


def make(order: dict) -> dict[str, list[dict]]:
    """
    The problems of an order, by split: of each, `task`, `question`, `answer` and `entry`.

    The test problems come first, and those for training are others: so the test set depends on neither the size of
    the training set nor on whether it is asked for.
    """
    rows: dict[str, list[dict]] = {split: [] for split in ("test", "train")}
    for task, wanted in order["tasks"].items():
        settings, seen = wanted["settings"], set()
        create(task, settings, 0, 1)  # what is wrong is said before another task's problems are made
        for split in [split for split in rows if split == "test" or split in order["splits"]]:
            for entry in draw(task, settings, f"{order['seed']} {split}", wanted[split], seen):
                row = {"task": task, "question": entry["question"], "answer": entry["answer"] or ""}
                # One task has fractions in its metadata, which its scorer does not look at.
                row["entry"] = json.dumps({"task": task, "settings": settings, **entry}, default=str)
                rows[split].append(row)
    for split, problems in rows.items():
        random.Random(f"{order['seed']} {split}").shuffle(problems)
    return {split: rows[split] for split in order["splits"]}


@lru_cache(maxsize=256)
def scorer(task: str, settings: str) -> ProceduralDataset:
    return create_dataset(task, seed=0, size=1, **json.loads(settings))


def read_entry(text: str) -> str | None:
    """The entry as it is, if there is a scorer for it."""
    try:
        entry = json.loads(text)
        scorer(entry["task"], json.dumps(entry["settings"]))
    except Exception:  # whatever it is, the problem cannot be scored
        return None
    return text


def check(text: str, answer: str, with_texts: bool) -> dict:
    """The score of an answer, 0 if its scorer fails at it."""
    entry = json.loads(text)  # each time: a scorer may write into it
    if entry["task"] in BOARDS_OF_TUPLES:
        entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
    try:
        score = float(scorer(entry["task"], json.dumps(entry["settings"])).score_answer(answer, entry))
        if score >= 1 and not ALSO_REQUIRED.get(entry["task"], lambda *_: True)(answer, entry):
            score = 0.0
    except Exception:  # the scorers are many hands' work, and garbage makes some of them raise whatever comes
        score = 0.0
    texts = {"gold_parsed": str(entry["answer"])[:500], "answer_parsed": answer[:500]} if with_texts else {}
    return {"reward": score, **texts}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        answers_to, sys.stdout = sys.stdout, sys.stderr  # some tasks print while they make problems
        try:
            json.dump(make(json.load(sys.stdin)), answers_to)
        except Mistake as error:
            json.dump({"mistake": str(error)}, answers_to)
    else:
        logging.disable()
        worker = runpy.run_path(str(Path(__file__).with_name("math_worker.py")))
        threading.Thread(target=worker["die_with"], args=[int(sys.argv[2])], daemon=True).start()
        worker["serve"](Connection(int(sys.argv[1])), float(sys.argv[3]), read_entry, check)
