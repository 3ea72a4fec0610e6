"""Old completions used again: what is kept of them, what is sampled, and what a checkpoint holds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batches_after, build_trainer, easy_prompt_reward, logged, make_dataset
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from e3_trl import E3GRPOTrainer
from e3_trl.runs.checkpoint import load_state
from e3_trl.runs.rollout_store import RolloutStore


REUSE = {"reuse_rollouts": True, "temperature_schedule": "constant"}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[list, int]]:
    """What TRL is asked to sample: prompts with their beginnings, and the limit."""
    calls, generate = [], GRPOTrainer._generate_single_turn

    def spy(self, prompt_ids, *args):
        calls.append((prompt_ids, self.generation_config.max_new_tokens))
        return generate(self, prompt_ids, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", spy)
    return calls


def completions(batches) -> dict[int, list[tuple]]:
    """Of each prompt, its completions in these batches."""
    found: dict[int, list[tuple]] = {}
    for batch in batches:
        for one in batch.rounds:
            for prompt_id, (tokens, _) in zip(one.prompt_ids.tolist(), one.rollouts, strict=True):
                found.setdefault(prompt_id, []).append(tuple(tokens.tolist()))
    return found


def test_what_the_policy_would_still_write_is_kept_but_of_prompts_that_were_never_solved(make_trainer, calls):
    """Of a policy that stays as it is, all; of longer groups the rest is drawn anew."""
    with batches_after("store") as batches:
        trainer = make_trainer(**REUSE, learning_rate=0.0, reward_funcs=easy_prompt_reward, max_steps=8)
        trainer.train()
    first, second = completions(batches[:4]), completions(batches[4:])
    assert {len(rows) for rows in second.values()} > {4}
    for prompt_id, rows in second.items():
        shared = min(len(rows), len(first[prompt_id]))
        same = [a == b for a, b in zip(rows[:shared], first[prompt_id][:shared], strict=True)]
        assert all(same) if prompt_id % 4 == 0 else not any(same)
    assert logged(trainer, "rollouts/reused")[:4] == [0.0] * 4
    num_reused = sum(len(row) for prompt_id in range(0, 16, 4) for row in first[prompt_id][: len(second[prompt_id])])
    assert num_reused == sum(one.num_reused for batch in batches for one in batch.rounds)
    sampled = sum(len(prompts) for prompts, _ in calls[4:])
    assert sampled == 4 * 16 - sum(min(len(second[p]), len(first[p])) for p in range(0, 16, 4))


def plain_logps(model, prompt: list[int], tokens: np.ndarray, temperature: float) -> torch.Tensor:
    """Written down from their definition."""
    ids = torch.tensor([*prompt, *tokens.tolist()])[None]
    with torch.no_grad():
        logps = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[-len(tokens) :, 0]


class Watched(E3GRPOTrainer):
    """Notes each round, and what the loss compares with."""

    calls: list
    notes: list
    old_logps: list

    def _generate_single_turn(self, prompt_ids, *args):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        num_calls, newest = len(self.calls), self._batch.round
        output = super()._generate_single_turn(prompt_ids, *args)
        temperatures = self.temperature_of(self._batch, newest.prompt_ids)
        rows = list(zip(prompt_ids, temperatures, newest.rollouts, strict=True))
        self.notes.append((self._batch.index, weights, rows, self.calls[num_calls:]))
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "old_per_token_logps" in inputs:
            columns = inputs["completion_ids"], inputs["completion_mask"].bool(), inputs["old_per_token_logps"]
            self.old_logps += [
                (tuple(ids[mask].tolist()), logps[mask]) for ids, mask, logps in zip(*columns, strict=True)
            ]
        return loss


@pytest.mark.parametrize(
    "settings",
    [{"num_iterations": 2, "max_steps": 20}, {"rollout_allocation": "vigor", "micro_batching": "none"}],
    ids=["trained on twice", "in rounds, with TRL's padding"],
)
def test_a_beginning_has_the_log_probs_of_the_policy_that_goes_on_with_it(make_trainer, calls, model_path, settings):
    """And of the row's temperature of now. What is asked for comes after it, as far as there is room."""
    settings = {"temperature_spread": 1.0, "learning_rate": 3e-3, "max_steps": 10} | settings
    trainer = make_trainer(Watched, **REUSE, **settings)
    trainer.calls, trainer.notes, trainer.old_logps = calls, [], []
    trainer.train()
    assert 0.1 < np.mean(logged(trainer, "rollouts/reused")[4:]) < 0.95
    model = AutoModelForCausalLM.from_pretrained(model_path)
    logps_of, kept, limits = {}, [], []
    written: list[dict] = [{} for _ in range(11)]  # completions by prompt, of each batch and those before it
    for index, weights, rows, asked in trainer.notes:
        model.load_state_dict(weights)
        for prompt, temperature, (tokens, logps) in rows:
            expected = plain_logps(model, prompt, tokens, temperature)
            assert torch.tensor(logps).allclose(expected, atol=1e-4)
            assert tokens[-1] == 1 or len(tokens) == 8
            logps_of.setdefault(tuple(tokens.tolist()), []).append(expected)
            for later in written[index + 1 :]:
                later.setdefault(tuple(prompt), []).append(tokens.tolist())
        for prompts, limit in asked:
            sizes = [next(len(p) for p, _, _ in rows if row[: len(p)] == p) for row in prompts]
            beginnings = [row[size:] for row, size in zip(prompts, sizes, strict=True)]
            for row, size, beginning in zip(prompts, sizes, beginnings, strict=True):
                old = written[index].get(tuple(row[:size]), [])
                assert not beginning or beginning in [one[: len(beginning)] for one in old]
            kept += map(len, beginnings)
            limits.append((limit, 8 - min(map(len, beginnings))))
    assert sum(map(bool, kept)) > 20
    assert all(limit == room for limit, room in limits)
    assert bool(trainer.old_logps) == ("num_iterations" in settings)
    for tokens, logps in trainer.old_logps:
        assert any(logps.allclose(expected, atol=1e-4) for expected in logps_of[tokens])


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory):
    """A run with a checkpoint in its second pass."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = build_trainer(model_path, folder, **REUSE, save_strategy="steps", save_steps=6, max_steps=6)
    trainer.train()
    return trainer


def test_a_checkpoint_holds_what_the_next_pass_begins_with(trained):
    store = trained.rollout_store
    folder = Path(trained.args.output_dir) / "checkpoint-6"
    arrays = {
        name: values for name, values in load_file(folder / "run_state.safetensors").items() if "rollouts." in name
    }
    sizes = {name.rpartition(".")[2]: values.nbytes for name, values in arrays.items()}
    assert sizes["tokens"] + sizes["logps"] == 8 * sum(
        len(tokens) for rows in store._rollouts.values() for tokens, _ in rows
    )
    assert 0 < len(store) < 16, "those that were solved"
    solved = np.flatnonzero(trained.difficulty_tracker.num_correct)
    assert sorted(store._rollouts) == solved.tolist()
    state = load_state(folder / "run_state.json")["parts"]["rollouts"]
    again = RolloutStore(is_main_process=True)
    again.restore(state)
    assert_same_arrays(again.state_to_save(), store.state_to_save())
    again.restore(None)
    assert len(again) == 0
    assert_same_arrays(again.state_to_save(), RolloutStore(is_main_process=True).state_to_save())
    again.restore(again.state_to_save())
    assert len(again) == 0


def assert_same_arrays(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name].dtype, found[name].tolist()) == (expected[name].dtype, expected[name].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "run_state.safetensors is damaged"), ({"train_dataset": make_dataset(20)}, "belongs to another dataset")],
    ids=["damaged", "foreign"],
)
def test_completions_that_are_damaged_or_anothers_are_refused(make_trainer, trained, tmp_path, settings, message):
    folder = Path(shutil.copytree(Path(trained.args.output_dir) / "checkpoint-6", tmp_path / "run" / "checkpoint-6"))
    path = folder / "run_state.safetensors"
    tokens = load_file(path)[".parts.rollouts.tokens"].tobytes()
    data = path.read_bytes()
    if not settings:
        assert data.count(tokens) == 1
        path.write_bytes(data.replace(tokens, tokens[::-1]))
    with pytest.raises(ValueError, match=message):
        make_trainer(**REUSE, **settings).train(resume_from_checkpoint=str(folder))
