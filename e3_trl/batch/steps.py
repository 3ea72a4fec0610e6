"""The steps of a generation batch, in their order: what [`E3GRPOTrainer`] does beside what TRL does."""

import numpy as np
import torch
from trl.trainer.utils import pad

from ..grpo.reward_errors import RewardError
from ..grpo.scoring import loss_mask, score_by_length
from ..method.advantages import aggregate_advantages
from ..method.counts import rollout_counts, rollout_metrics
from ..method.length_bias import length_bias
from ..method.prepo import entropy_weights, prompt_perplexity, select_by_perplexity, token_mean
from .batch import GenerationBatch
from .prompt_ids import PROMPT_ID, read_examples


def choose_prompts(trainer, batch: GenerationBatch) -> None:
    """
    Choose the batch's prompts among its candidates, by their perplexity (PREPO) or by how probable it is that they are
    partly solved (DPS), and give them their budgets. Else they are those that the sampler gave, with theirs.

    They keep the candidates' order: in the order of perplexity, the last process would always have the longest work.
    """
    if trainer.args.prompt_selection_ratio == 1:
        return
    candidates, number = batch.prompt_ids, len(batch.group_ids) // trainer.num_generations
    if trainer.args.prompt_selection == "partly_solved":
        predicted = trainer.difficulty_tracker.solved_chain.partly_solved(candidates)
        chosen = np.sort(np.argsort(-predicted, kind="stable")[:number])
        trainer.add_metric("partly_solved/candidates", float(predicted.mean()))
        trainer.add_metric("partly_solved/selected", float(predicted[chosen].mean()))
    else:
        chosen = _by_perplexity(trainer, batch, candidates, number)
    batch.begin_with(trainer.passes.sampler.rows(candidates[chosen]))


def _by_perplexity(trainer, batch: GenerationBatch, candidates: np.ndarray, number: int) -> np.ndarray:
    """Places of so many of the candidates."""
    share = np.resize(candidates, (batch.num_processes, -(-len(candidates) // batch.num_processes)))
    perplexity = trainer.accelerator.gather(_perplexity(trainer, batch, share[batch.process_index]))
    perplexity = perplexity[: len(candidates)].float().cpu().numpy()
    progress = trainer.state.global_step / trainer.state.max_steps
    chosen = np.sort(select_by_perplexity(perplexity, number, progress))
    trainer.add_metric("prompt_perplexity/candidates", float(perplexity.mean()))
    trainer.add_metric("prompt_perplexity/selected", float(perplexity[chosen].mean()))
    return chosen


def _perplexity(trainer, batch: GenerationBatch, prompt_ids: np.ndarray) -> torch.Tensor:
    """Of each prompt's tokens after the first, at temperature 1; shape `(len(prompt_ids),)`."""
    prompts = [row["prompt"] for row in read_examples(batch.dataset, prompt_ids, ["prompt"])]
    tokens = [torch.tensor(ids, device=trainer.accelerator.device) for ids in trainer.tokenize(prompts)]
    ids, mask = pad(tokens, trainer.pad_token_id), pad([torch.ones_like(ids) for ids in tokens])
    # Of a text that goes on after its first token.
    rows = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1]}
    rows |= {"completion_ids": ids[:, 1:], "completion_mask": mask[:, 1:]}
    with trainer.live_temperature.at(1.0):
        logps, _ = score_by_length(trainer, rows)
    return prompt_perplexity(logps, mask[:, 1:])


def log_prompt_ids(trainer, batch: GenerationBatch | None, num_rows: int) -> None:
    """
    Let TRL's table of completions (`log_completions`) say which prompt each of this process's rows is of. Those of an
    evaluation, which has no batch, are of none, and have to say so: the table's columns have to stay equally long.
    """
    if trainer.log_completions:
        ids = [None] * num_rows if batch is None else batch.of_kept(batch.sampled_ids)[batch.share].tolist()
        trainer.extra_logs[PROMPT_ID] = ids


def count(trainer, batch: GenerationBatch) -> None:
    """Log what was sampled, whether it is trained on or not, and count it towards difficulty (Section 4.1)."""
    correctness = batch.rewards[:, trainer.correctness_column].cpu().numpy()
    counts = rollout_counts(batch.sampled_ids, correctness, batch.lengths.cpu().numpy())
    for name, value in rollout_metrics(counts).items():
        trainer.add_metric(name, value)
    if trainer.args.dynamic_sampling:
        trainer.add_metric("rollouts/sampled", float(len(batch.sampled_ids)))
        trainer.add_metric("rollouts/discarded", float(len(batch.sampled_ids) - len(batch.group_ids)))
    if trainer.accelerator.is_main_process:
        of_prompt = [method(batch, counts["prompt_id"]) for method in (trainer.difficulty_of, trainer.temperature_of)]
        place = trainer.state.global_step + 1, batch.index, trainer.passes.number
        trainer.rollout_log.append(place, counts, *of_prompt)
    if batch.indexed:
        trainer.difficulty_tracker.observe(batch.sampled_ids, correctness)


def store(trainer, batch: GenerationBatch) -> None:
    """
    With `reuse_rollouts`, keep what was sampled, for these prompts' next batch to begin with; of prompts that were
    never solved nothing, for that would be their failures again.
    """
    if trainer.rollout_store is None:
        return
    reused = sum(one.num_reused for one in batch.rounds)
    trainer.add_metric("rollouts/reused", reused / batch.lengths.sum().item())
    rollouts = [rollout for one in batch.rounds for rollout in one.rollouts]
    solved = trainer.difficulty_tracker.num_correct[batch.sampled_ids] > 0
    trainer.rollout_store.put(batch.sampled_ids, rollouts, solved)


def shape_rewards(trainer, batch: GenerationBatch) -> None:
    """The rewards that are compared: with a length bias, correct completions of easy prompts lose part of theirs."""
    rewards = batch.shaped_rewards = batch.of_kept(batch.rewards).clone()
    if trainer.args.length_bias_coef > 0:
        correctness = rewards[:, trainer.correctness_column]
        difficulty = trainer.difficulty_of(batch, batch.of_kept(batch.sampled_ids))
        correctness *= 1 - length_bias(
            correctness > 0.5,
            batch.of_kept(batch.lengths),
            torch.as_tensor(batch.group_ids, device=rewards.device),
            torch.as_tensor(difficulty, device=rewards.device),
            trainer.args.length_bias_coef,
            trainer.args.length_bias_fraction,
        )


def compute_advantages(trainer, batch: GenerationBatch) -> None:
    """Eq. 2 for groups of any size: TRL compares rows of `num_generations`."""
    try:
        batch.advantages, std = aggregate_advantages(
            batch.shaped_rewards,
            trainer.reward_weights,
            torch.as_tensor(batch.group_ids, device=trainer.accelerator.device),
            trainer.scale_rewards,
            trainer.multi_objective_aggregation,
            trainer.args.advantage_scale,
        )
    except ValueError as error:  # of rewards that the setting is not for, which may come late in a run
        raise RewardError(str(error)) from error
    is_equal = torch.isclose(std, torch.zeros_like(std))
    trainer.replace_metric("frac_reward_zero_std", is_equal.float().mean().item())


def weigh_by_entropy(trainer, batch: GenerationBatch, output: dict) -> None:
    """PREPO: multiply each completion's advantage by its entropy relative to the batch's."""
    if trainer.args.entropy_weighting:
        _, entropies = score_by_length(trainer, output)
        weights = entropy_weights(trainer.accelerator.gather(token_mean(entropies, loss_mask(output))))
        trainer.add_metric("entropy_weight/max", weights.max().item())
        batch.advantages = batch.advantages * weights
