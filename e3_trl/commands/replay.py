"""
What another budget rule would have given on a run that is over, without a GPU:

    e3-trl replay outputs/e3 --rules uniform knapsack my_package.rules.my_rule [--figure replay.png]

For each rule: the share of rollouts that go to prompts with a signal (whose rewards differ), the share of prompts
whose rollouts are all wrong, and the rollouts of a prompt by its success rate.

It assumes that the policy would have been the same: that a rule changes how often a prompt is sampled, not how often
it is solved. So it says what a rule does with its first batches better than where it leads. A prompt's success rate in
a batch is not known but from its few rollouts there; it is taken to have a Beta distribution, which of all prompts of
that pass is fitted to their rollouts, and of one prompt is its posterior. Rollouts of other passes would say more of a
policy that does not change, and were tried: on runs that learn they made the prediction worse.

`pilot` and `vigor` follow a batch's first rewards, which are drawn from these distributions, several times.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..method.budget import RolloutBudgetSchedule
from ..method.budget_rules import (
    ROUND_RULES,
    RULES,
    VIGOR_ROUNDS,
    Bounds,
    commit_rollouts,
    load_rule,
    pilot_rollouts,
    refine_rollouts,
    split_rounds,
)
from ..method.difficulty import DifficultyTracker
from ..runs.report import read_settings, write_json
from ..runs.rollout_log import read_rollout_columns
from . import mistakes_named


# Settings of the run that may be others here.
AS_IN_TRAINING = (
    "num_generations_min", "num_generations_max", "num_generations_step", "success_decay", "success_prior",
)  # fmt: skip
# Of success rates, for the rollouts of a prompt by its success rate.
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# How often a run is drawn for rules that follow first rewards.
DRAWS = 8


@dataclass
class Batch:
    """
    A generation batch of the run.

    Attributes:
        number (`int`): passes over the dataset before this one.
        prompt_ids (`np.ndarray` of shape `(P,)`): its prompts.
        rollouts (`np.ndarray` of shape `(P,)`): how often each was sampled.
        correct (`np.ndarray` of shape `(P,)`): how many of these were right.
        difficulty (`np.ndarray` of shape `(P,)`): what the run's budgets came from, NaN = not known.
    """

    number: int
    prompt_ids: np.ndarray
    rollouts: np.ndarray
    correct: np.ndarray
    difficulty: np.ndarray


def read_batches(path: str | Path) -> list[Batch]:
    """A run's batches, from its `rollouts.jsonl`."""
    rows = read_rollout_columns(path)
    if np.isnan(rows["batch"]).any():
        raise ValueError(f"{path} has rows that do not say their batch, of an earlier version. Train anew to replay.")
    begins = np.flatnonzero(np.diff(rows["batch"])) + 1
    if not len(rows["batch"]):
        return []
    numbers = rows["pass"][np.r_[0, begins]].tolist()
    names = ("prompt_id", "rollouts", "correct", "difficulty")
    return [Batch(*of_batch) for of_batch in zip(numbers, *(np.split(rows[n], begins) for n in names), strict=True)]


def starting_difficulty(batches: list[Batch]) -> np.ndarray:
    """
    Of each prompt, shape `(num_prompts,)`, NaN = not known, as the first pass ranked them: a run does not keep its
    `difficulty_column`. Rules by success rate get it as if it were the share of wrong answers.
    """
    difficulty = np.full(1 + max(int(batch.prompt_ids.max()) for batch in batches), np.nan)
    for batch in batches:
        if batch.number == 0:
            difficulty[batch.prompt_ids] = batch.difficulty
    return difficulty


def fit_beta(correct: np.ndarray, rollouts: np.ndarray) -> tuple[float, float]:
    r"""
    \\( \alpha \\) and \\( \beta \\) of the Beta distribution that success rates are drawn from, by moments.

    Args:
        correct (`np.ndarray` of shape `(P,)`): right rollouts of each prompt.
        rollouts (`np.ndarray` of shape `(P,)`): its rollouts.
    """
    mean = np.clip(correct.sum() / rollouts.sum(), 0.01, 0.99)
    # Var[c / n] = mean (1 - mean) (1 / n + (1 - 1 / n) correlation)
    inverse = (1 / rollouts).mean()
    relative = ((correct / rollouts - mean) ** 2).mean() / (mean * (1 - mean))
    correlation = np.clip((relative - inverse) / (1 - inverse), 0.01, 0.99)
    strength = 1 / correlation - 1
    return float(mean * strength), float((1 - mean) * strength)


def chance_of_none(alpha: np.ndarray, beta: np.ndarray, rollouts: np.ndarray) -> np.ndarray:
    r"""\\( E[(1 - p)^n] \\) for \\( p \sim Beta(\alpha, \beta) \\), all of shape `(P,)`."""
    draws_N = np.arange(rollouts.max())
    factors_PN = (beta[:, None] + draws_N) / (alpha[:, None] + beta[:, None] + draws_N)
    return np.where(draws_N < rollouts[:, None], factors_PN, 1.0).prod(axis=1)


def budgets_by_rule(
    batches: list[Batch], rule: str, schedule: RolloutBudgetSchedule, decay: float = 1.0, prior: float = 0.0
) -> Iterator[np.ndarray]:
    """What a rule gives each batch, shape `(P,)`, from the rollouts of the passes before."""
    initial = starting_difficulty(batches)
    tracker = DifficultyTracker(len(initial), initial, decay, prior, predicts=rule not in RULES)
    number = 0
    for batch in batches:
        if batch.number > number:
            tracker.update()
            number = batch.number
        bounds = Bounds(schedule.num_generations, *schedule.bounds(number))
        yield load_rule(rule)(tracker.stats(batch.prompt_ids), bounds)
        ids = np.repeat(batch.prompt_ids, batch.rollouts)
        places = np.concatenate([np.arange(n) for n in batch.rollouts])
        tracker.observe(ids, (places < np.repeat(batch.correct, batch.rollouts)).astype(float))


def replay(batches: list[Batch], budgets: list[np.ndarray]) -> dict[str, float | dict[str, float]]:
    """
    What budgets would have given.

    Args:
        batches (`list[Batch]`): of the run.
        budgets (`list[np.ndarray]`): rollouts of each batch's prompts.

    Returns:
        `dict` of expected `signal` (share of rollouts on prompts whose rewards differ), `all_wrong` (share of prompts
        all of whose rollouts are wrong), and `rollouts` (mean of a prompt, by its success rate in its batch).
    """
    alpha, beta = (np.concatenate(column) for column in zip(*posteriors(batches), strict=True))
    rollouts = np.concatenate(budgets)
    none, all_right = chance_of_none(alpha, beta, rollouts), chance_of_none(beta, alpha, rollouts)
    by_rate = mean_by_rate(rollouts, alpha / (alpha + beta))
    signal = float((rollouts * (1 - none - all_right)).sum() / rollouts.sum())
    return {"signal": signal, "all_wrong": float(none.mean()), "rollouts": by_rate}


def sample_in_rounds(rule: str, bounds: Bounds, draw: Callable[[np.ndarray], np.ndarray], num_prompts: int) -> tuple:
    """
    A batch sampled as `pilot` or `vigor` does, by one process.

    Args:
        rule (`str`): which of them.
        bounds ([`Bounds`]): mean, fewest and most rollouts of a prompt.
        draw (`Callable`): right rollouts of so many of each prompt, both of shape `(P,)`.
        num_prompts (`int`): prompts of the batch.

    Returns:
        `tuple` of two `np.ndarray` of shape `(P,)`: rollouts, and how many of them were right.
    """
    sampled = pilot_rollouts(num_prompts, bounds.num_generations_min)
    correct = draw(sampled)
    if rule == "pilot":
        rest = (
            commit_rollouts(correct / sampled, sampled, bounds.num_generations, bounds.num_generations_max) - sampled
        )
        return sampled + rest, correct + draw(rest)
    active = np.ones(num_prompts, dtype=bool)
    for rows in split_rounds(int(num_prompts * bounds.num_generations - sampled.sum()), VIGOR_ROUNDS):
        mean = correct / sampled
        variance = np.where(sampled > 1, mean * (1 - mean) * sampled / np.maximum(sampled - 1, 1), np.nan)
        given, active = refine_rollouts(variance, mean, sampled, active, rows, bounds.num_generations_max)
        sampled, correct = sampled + given, correct + draw(given)
    return sampled, correct


def replay_rounds(batches: list[Batch], rule: str, schedule: RolloutBudgetSchedule) -> dict[str, float | dict]:
    """As [`replay`], of a rule that follows first rewards."""
    rng = np.random.default_rng(0)
    sampled, rates = [], []
    for _ in range(DRAWS):
        for batch, (alpha, beta) in zip(batches, posteriors(batches), strict=True):
            rate = rng.beta(alpha, beta)
            bounds = Bounds(schedule.num_generations, *schedule.bounds(batch.number))
            counts = sample_in_rounds(rule, bounds, lambda n, rate=rate: rng.binomial(n, rate), len(rate))
            sampled.append(Batch(batch.number, batch.prompt_ids, *counts, batch.difficulty))
            rates.append(alpha / (alpha + beta))
    rollouts = np.concatenate([batch.rollouts for batch in sampled])
    return measured(sampled) | {"rollouts": mean_by_rate(rollouts, np.concatenate(rates))}


def mean_by_rate(rollouts: np.ndarray, rate: np.ndarray) -> dict[str, float]:
    """Mean rollouts of the prompts whose success rate lies in each of `BINS`; both of shape `(P,)`."""
    place = np.digitize(rate, BINS[1:-1])
    return {
        f"{BINS[index]:g}-{BINS[index + 1]:g}": float(rollouts[place == index].mean())
        for index in range(len(BINS) - 1)
        if (place == index).any()
    }


def posteriors(batches: list[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each batch's prompts, alpha and beta of their success rates given their rollouts there."""
    fitted = {}
    for number in {batch.number for batch in batches}:
        of_pass = [batch for batch in batches if batch.number == number]
        columns = ([getattr(batch, name) for batch in of_pass] for name in ("correct", "rollouts"))
        fitted[number] = fit_beta(*map(np.concatenate, columns))
    for batch in batches:
        alpha, beta = fitted[batch.number]
        yield alpha + batch.correct, beta + batch.rollouts - batch.correct


def measured(batches: list[Batch]) -> dict[str, float]:
    """What the run itself had: `signal` and `all_wrong` as in [`replay`], counted."""
    rollouts, correct = (np.concatenate([getattr(b, name) for b in batches]) for name in ("rollouts", "correct"))
    differs = (correct > 0) & (correct < rollouts)
    return {"signal": float(rollouts[differs].sum() / rollouts.sum()), "all_wrong": float((correct == 0).mean())}


def draw(results: dict[str, dict], path: Path) -> None:
    """Rollouts of a prompt by its success rate, a line per rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.3), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        if "rollouts" in result:
            label = f"{name}: {result['signal']:.2f} of rollouts with a signal"
            axes.plot(result["rollouts"].keys(), result["rollouts"].values(), marker="o", markersize=4, label=label)
    axes.set(xlabel="success rate of the prompt in its batch", ylabel="rollouts of a prompt", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or its rollouts.jsonl")
    parser.add_argument(
        "--rules",
        nargs="+",
        default=[*RULES, *ROUND_RULES],
        help=f"any of {[*RULES, *ROUND_RULES]}, or a dotted path (these)",
    )
    parser.add_argument("--num_generations_min", type=int, help="as in training (that of the run)")
    parser.add_argument("--num_generations_max", type=int, help="as in training (that of the run)")
    parser.add_argument("--num_generations_step", type=int, help="as in training (that of the run, else 2)")
    parser.add_argument("--success_decay", type=float, help="as in training (that of the run, else 1)")
    parser.add_argument("--success_prior", type=float, help="as in training (that of the run, else 0)")
    parser.add_argument("--figure", help="where to draw the budgets")
    parser.add_argument("--output", help="where to write the numbers, as JSON")
    args = parser.parse_args(arguments)
    run = Path(args.run)
    if not run.exists():
        parser.error(f"{run} is not there. Name a run's folder, or its rollouts.jsonl.")
    batches = read_batches(run)
    if not batches:
        parser.error(f"{run} holds no whole row. Name a run that has sampled a batch.")
    settings = (read_settings(run) if run.is_dir() else None) or {}
    num_generations = settings.get("num_generations", min(round(batch.rollouts.mean()) for batch in batches))
    settings |= {name: value for name, value in vars(args).items() if name in AS_IN_TRAINING and value is not None}
    names = ("num_generations_min", "num_generations_max", "num_generations_step")
    bounds = {name: settings[name] for name in names if settings.get(name) is not None}
    starts_ranked = settings.get("difficulty_column") is not None
    schedule = RolloutBudgetSchedule(num_generations, **bounds, starts_ranked=starts_ranked)
    counting = settings.get("success_decay", 1.0), settings.get("success_prior", 0.0)
    results = {"measured": measured(batches), "as it was": replay(batches, [batch.rollouts for batch in batches])}
    for rule in args.rules:
        if rule in ROUND_RULES:
            results[rule] = replay_rounds(batches, rule, schedule)
        else:
            results[rule] = replay(batches, list(budgets_by_rule(batches, rule, schedule, *counting)))
    print(f"{'':24} with a signal   all wrong   rollouts by success rate")
    for name, result in results.items():
        by_rate = "  ".join(f"{rate}: {mean:.1f}" for rate, mean in result.get("rollouts", {}).items())
        print(f"{name:24} {result['signal']:13.3f} {result['all_wrong']:11.3f}   {by_rate}")
    if args.figure:
        draw(results, Path(args.figure))
    if args.output:
        write_json(args.output, results)
    return results


def run(arguments: list[str] | None = None) -> None:
    with mistakes_named():
        main(arguments)


if __name__ == "__main__":
    run()
