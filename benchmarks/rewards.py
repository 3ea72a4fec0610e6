"""
How long 512 completions take: `math_accuracy_reward` against TRL's serial `accuracy_reward`. `make benchmark`.

Both check the same completions in turn: 64 prompts with 8 completions each, new ones in every round, so that neither
knows an answer from the round before. A completion is some paragraphs of reasoning with formulas, then its answer.
Last, the pool's time per completion where each has a gold answer of its own, which should not grow with their number.
"""

import random
import statistics
import time

from trl.rewards import accuracy_reward

from e3_trl.rewards.worker_pool import WorkerPool


PROMPTS, COMPLETIONS, ROUNDS = 64, 8, 15
DISTINCT = (500, 4000)  # gold answers


def answer(rng: random.Random) -> str:
    """An answer as in MATH: mostly whole numbers, else fractions, roots, points, intervals and polynomials."""
    a, b, c = (rng.randint(2, 999) for _ in range(3))
    forms = [rf"\frac{{{a}}}{{{b}}}", rf"{a}\sqrt{{{b}}}", f"({a}, {b})", f"[{a}, {a + b})", f"{a}x^2-{b}x+{c}"]
    return rng.choice([str(a * b)] * len(forms) + forms)


def batch(rng: random.Random) -> tuple[list[str], list[str]]:
    """Completions, half of them right, and their gold answers."""
    completions, golds = [], []
    for _ in range(PROMPTS):
        gold = answer(rng)
        for _ in range(COMPLETIONS):
            steps = " ".join(f"From ${answer(rng)}$ it follows that $x = {answer(rng)}$." for _ in range(40))
            completions.append(rf"{steps} The answer is \boxed{{{rng.choice([gold, answer(rng)])}}}.")
            golds.append(f"${gold}$")
    return completions, golds


def seconds(function, *arguments) -> tuple[float, list[float]]:
    start = time.perf_counter()
    rewards = function(*arguments)
    return time.perf_counter() - start, rewards


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    rng = random.Random(0)
    pool = WorkerPool()

    def serial(completions: list[str], golds: list[str]) -> list[float | None]:
        return accuracy_reward([[{"content": text}] for text in completions], golds)

    def pooled(completions: list[str], golds: list[str]) -> list[float | None]:
        return [verdict.reward for verdict in pool.check(completions, golds, describe=True)]

    started, _ = seconds(pooled, *batch(rng))
    serial(*batch(rng))
    times: dict[str, list[float]] = {"serial": [], "pool": []}
    for _ in range(ROUNDS):
        completions, golds = batch(rng)
        time_serial, expected = seconds(serial, completions, golds)
        time_pool, rewards = seconds(pooled, completions, golds)
        if rewards != expected:
            raise RuntimeError("The two rewards differ.")
        times["serial"].append(time_serial)
        times["pool"].append(time_pool)
    ratios = [a / b for a, b in zip(times["serial"], times["pool"], strict=True)]
    print(f"{len(golds)} completions, {pool.size} workers, {ROUNDS} rounds    median (fastest - slowest)")
    print(f"accuracy_reward, serial          {spread(times['serial'])} s")
    print(f"math_accuracy_reward             {spread(times['pool'])} s")
    print(f"times faster                     {spread(ratios)}")
    print(f"first call, starting the workers {started:6.2f} s")
    per_completion: dict[int, list[float]] = {number: [] for number in DISTINCT}
    for round_ in range(5):
        for number in DISTINCT:
            golds = [f"${round_}.{number}{gold}$" for gold in range(number)]
            time_pool, _ = seconds(pooled, [r"\boxed{1}"] * number, golds)
            per_completion[number].append(1000 * time_pool / number)
    for number, times_ms in per_completion.items():
        print(f"per completion, {number:5} golds      {spread(times_ms)} ms")
    pool.close()
