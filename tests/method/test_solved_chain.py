"""Which prompts will be partly solved, and their choice by it."""

import numpy as np
import pytest
from conftest import logged, make_dataset, vowel_reward
from hypothesis import given
from hypothesis import strategies as st

from e3_trl import DifficultyTracker, read_rollouts
from e3_trl.commands.replay import budgets_by_rule, read_batches
from e3_trl.method.solved_chain import PARTLY, SOLVED, UNSOLVED, SolvedChain


NAN = float("nan")
REWARDS = {UNSOLVED: [0.0, 0.0, NAN], PARTLY: [0.0, 1.0, 0.2], SOLVED: [1.0, NAN, 0.9]}


class Reference:
    """The definition, for one prompt."""

    def __init__(self, decay):
        self.decay, self.counts, self.belief = decay, np.ones((3, 3)), np.full(3, 1 / 3)
        self.last = 0

    @property
    def matrix(self):
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    def move_to(self, number):
        belief = self.belief
        for _ in range(number - 1 - self.last):
            belief = belief @ self.matrix
        return belief

    def observe(self, state, number):
        before = self.move_to(number)
        came_from = before * self.matrix[:, state]
        self.counts = self.decay * self.counts + (1 - self.decay) * np.ones((3, 3))
        self.counts[:, state] += came_from / came_from.sum()
        self.belief, self.last = np.eye(3)[state], number


@given(
    st.lists(st.lists(st.sampled_from([None, UNSOLVED, PARTLY, SOLVED]), min_size=3, max_size=3), max_size=6),
    st.sampled_from([0.0, 0.9, 1.0]),
)
def test_each_prompt_follows_the_definition(passes, decay):
    chain, references = SolvedChain(3, decay), [Reference(decay) for _ in range(3)]
    for number, states in enumerate(passes):
        seen = [prompt for prompt in (2, 0, 1) if states[prompt] is not None]
        if seen:
            rewards = [reward for prompt in seen for reward in REWARDS[states[prompt]]]
            chain.observe(np.repeat(seen, 3), rewards)
        for prompt in seen:
            references[prompt].observe(states[prompt], number)
        chain.begin_pass()
    number = len(passes)
    expected = [(reference.move_to(number) @ reference.matrix)[PARTLY] for reference in references]
    assert chain.partly_solved([0, 1, 2]) == pytest.approx(expected)


def test_what_was_partly_solved_is_expected_to_be_so_again_and_what_nobody_met_is_open():
    chain = SolvedChain(3)
    for _ in range(4):
        chain.observe([0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0])
        chain.begin_pass()
    partly, unsolved, never = chain.partly_solved([0, 1, 2])
    assert never == pytest.approx(1 / 3)
    assert partly > 0.6 > never > unsolved


def test_a_tracker_keeps_it_and_one_that_begins_to_predict_goes_on():
    old = DifficultyTracker(2, predicts=True)
    old.observe([0, 0], [1.0, 0.0])
    old.update()
    new = DifficultyTracker(2, predicts=True)
    new.load_state_dict(old.state_dict())
    assert new.stats([0, 1]).partly_solved.tolist() == old.stats([0, 1]).partly_solved.tolist()
    assert new.solved_chain.num_passes == 1
    new = DifficultyTracker(2, predicts=True)
    new.load_state_dict(DifficultyTracker(2).state_dict())
    assert new.stats([0]).partly_solved == pytest.approx(1 / 3)
    DifficultyTracker(2).load_state_dict(old.state_dict())  # and one that has stopped


def partly_solved_reward(completions, threshold, **kwargs):
    """Right for every other completion of a prompt of threshold 1, never for others."""
    return [float(t == 1 and index % 2 == 0) for index, t in enumerate(threshold)]


@pytest.mark.parametrize("num_prompts", [16, 32])
@pytest.mark.slow
def test_those_that_were_partly_solved_are_chosen(make_trainer, num_prompts):
    """A quarter of the prompts is; once known, the choice among four times as many finds it."""
    trainer = make_trainer(
        train_dataset=make_dataset(num_prompts),
        reward_funcs=partly_solved_reward,
        prompt_selection_ratio=0.25,
        prompt_selection="partly_solved",
        rollout_allocation="uniform",
        max_steps=num_prompts,
        dynamic_sampling=False,
    )
    trainer.train()
    rows = read_rollouts(trainer.args.output_dir)
    last = [row["prompt_id"] % 4 == 1 for row in rows if row["step"] > num_prompts * 3 // 4]
    first = [row["prompt_id"] % 4 == 1 for row in rows if row["step"] <= num_prompts // 16]
    assert np.mean(last) > max(0.5, np.mean(first))
    assert logged(trainer, "partly_solved/selected")[-1] > logged(trainer, "partly_solved/candidates")[-1]
    assert trainer.passes.number > 2


def by_prediction(stats, bounds):
    """A rule of the user's own: the rest to the most probable one."""
    SEEN.append(stats.partly_solved)
    budgets = np.full(len(stats.difficulty), bounds.num_generations)
    order = np.argsort(stats.partly_solved)
    if bounds.num_generations_min < bounds.num_generations:
        budgets[order[0]] -= 1
        budgets[order[-1]] += 1
    return budgets


SEEN = []


def test_a_rule_of_ones_own_is_told(make_trainer):
    SEEN.clear()
    trainer = make_trainer(rollout_allocation=f"{__name__}.by_prediction", reward_funcs=vowel_reward)
    trainer.train()
    assert len(SEEN) >= 12
    assert all(((values > 0) & (values < 1)).all() for values in SEEN)
    assert len({tuple(values) for values in SEEN}) > 3
    in_training = [values.tolist() for values in SEEN]
    SEEN.clear()
    batches = read_batches(trainer.args.output_dir)
    rule, schedule = trainer.args.rollout_allocation, trainer.args.make_budget_schedule()
    budgets = [budget.tolist() for budget in budgets_by_rule(batches, rule, schedule)]
    assert budgets == [batch.rollouts.tolist() for batch in batches], "replay tells it the same"
    assert [values.tolist() for values in SEEN] == in_training[: len(SEEN)]


@pytest.mark.slow
def test_a_run_that_goes_on_chooses_the_same_prompts(make_trainer):
    settings = {"prompt_selection_ratio": 0.5, "prompt_selection": "partly_solved", "save_strategy": "steps"}
    whole = make_trainer(save_steps=5, **settings)
    whole.train()
    resumed = make_trainer(save_steps=20, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5")
    assert resumed.difficulty_tracker.solved_chain.num_passes == whole.passes.number > 1
    for name in ("partly_solved/candidates", "partly_solved/selected", "loss", "reward"):
        assert logged(resumed, name) == logged(whole, name), name
