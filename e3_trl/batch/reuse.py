"""Completions of the pass before begin those of this one, as far as the policy of today would still write them."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from trl.trainer.utils import pad

from ..grpo.scoring import answered, score_by_length
from ..method.verification import accepted_tokens
from .batch import GenerationBatch
from .row_sampling import rows_sampled


# Of prompts' tokens: the tokens of a completion each, and their log-probs, `None` where nobody knows them.
Sample = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
# A completion's tokens and log-probs, as the store has them.
Rollout = tuple[np.ndarray, np.ndarray]
# Of each process in a call of transformers' `generate`, where there are several.
FEWEST_ROWS = 32


def generate(trainer, batch: GenerationBatch, prompt_ids: list[list[int]], sample: Sample) -> tuple:
    """
    Sample the batch's newest round: what is left of the old completions is kept, and the rest is sampled.

    What is left to sample is shared out evenly, so that the processes have as many rows as each other whatever each of
    them has kept: the engine asks for that, and a model that lies in pieces.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer, with a `rollout_store`.
        batch ([`GenerationBatch`]): the batch.
        prompt_ids (`list[list[int]]`): tokens of the prompts of this process's rows.
        sample (`Callable`): what samples completions of this process's prompts.

    Returns:
        `tuple`: what TRL's `_generate_single_turn` returns, of this process's rows.
    """
    newest = batch.round
    ids, prompts = newest.prompt_ids, gather_object(prompt_ids)
    rollouts = newest.rollouts = verified_beginnings(trainer, batch, prompts)
    newest.num_reused = sum(len(tokens) for tokens, _ in rollouts)
    rest = [row for row, (tokens, _) in enumerate(rollouts) if not is_finished(trainer, tokens)]
    # Rows of a prompt that begin alike are neighbours then, which an engine gets as one request.
    first = {prompt: place for place, prompt in reversed(list(enumerate(ids.tolist())))}
    rest.sort(key=lambda row: (first[ids[row]], len(rollouts[row][0])))
    for part in _calls(trainer, rest, rollouts):
        sampled = sample_rest(trainer, batch, prompts, part, sample)
        for row, continuation in zip(part, sampled, strict=True):
            rollouts[row] = tuple(np.concatenate(both) for both in zip(rollouts[row], continuation, strict=True))
    if not trainer.use_vllm:  # transformers' generate tells no log-probs
        scored = score(trainer, batch, prompts, {row: rollouts[row][0] for row in rest})
        for row in rest:
            rollouts[row] = rollouts[row][0], scored[row]
    mine = rollouts[batch.share_of(ids)]
    tokens, logps = ([of_row.tolist() for of_row in column] for column in zip(*mine, strict=True))
    return tokens, logps if trainer.use_vllm else None


def _calls(trainer, rest: list[int], rollouts: list[Rollout]) -> list[list[int]]:
    """
    The rows of each call. An engine gets all at once; transformers' `generate` pads all to the longest beginning and
    goes on with all as far as the one with the most room, so it gets those that begin at about the same length, unless
    they are so few that a call costs more than they do.
    """
    limit, quarters = trainer.args.max_completion_length, range(4)
    of_quarter = [[row for row in rest if len(rollouts[row][0]) * 4 // limit == quarter] for quarter in quarters]
    fewest = len(rest) if trainer.use_vllm else FEWEST_ROWS * trainer.accelerator.num_processes
    calls: list[list[int]] = []
    for rows in filter(None, of_quarter):
        if calls and min(len(calls[-1]), len(rows)) < fewest:
            calls[-1] += rows
        else:
            calls.append(rows)
    return calls


def is_finished(trainer, tokens: np.ndarray) -> bool:
    """Whether a completion has ended, by itself or at the limit."""
    if len(tokens) == 0:
        return False
    return tokens[-1] in trainer.eos_token_ids or len(tokens) >= trainer.args.max_completion_length


def verified_beginnings(trainer, batch: GenerationBatch, prompts: list[list[int]]) -> list[Rollout]:
    """
    What is kept of the old completions of the newest round's rows, over all processes, with the log-probs of today.

    A row's draws follow from its place in the batch, so they are the same however many processes share it.
    """
    ids, sampled_ids = batch.round.prompt_ids, batch.sampled_ids
    first_row = len(sampled_ids) - len(ids)  # rounds before have taken theirs
    places = _occurrences(sampled_ids)[first_row:]
    (old,) = broadcast_object_list([trainer.rollout_store.get(ids, places)])
    old = [tuple(values[: trainer.args.max_completion_length] for values in rollout) for rollout in old]
    scored = score(trainer, batch, prompts, {row: tokens for row, (tokens, _) in enumerate(old) if len(tokens)})
    for row, new_logps in scored.items():
        tokens, old_logps = old[row]
        uniforms = np.random.default_rng([trainer.args.seed, 2, batch.index, first_row + row]).random(len(tokens))
        kept = accepted_tokens(new_logps, old_logps, uniforms)
        old[row] = tokens[:kept], new_logps[:kept]
    return old


def _occurrences(values: np.ndarray) -> np.ndarray:
    """Of each value, how often it stands before."""
    order = np.argsort(values, kind="stable")
    _, first, inverse = np.unique(values[order], return_index=True, return_inverse=True)
    places = np.empty_like(order)
    places[order] = np.arange(len(values)) - first[inverse]
    return places


def score(trainer, batch: GenerationBatch, prompts: list[list[int]], completions: dict[int, np.ndarray]) -> dict:
    """
    Log-probs of completions under the policy as it is, at the temperatures of their rows: one pass, in which each
    process has as many, and as long ones, as the others.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch, with its newest round.
        prompts (`list[list[int]]`): the prompts of the round's rows of all processes.
        completions (`dict[int, np.ndarray]`): tokens by row. The same on all processes.

    Returns:
        `dict[int, np.ndarray]`: float32 log-probs by row, on all processes.
    """
    if not completions:
        return {}
    device, num_processes = trainer.accelerator.device, trainer.accelerator.num_processes
    longest_first = sorted(completions, key=lambda row: -len(prompts[row]) - len(completions[row]))
    by_process = np.resize(longest_first, (-(-len(completions) // num_processes), num_processes)).T
    mine = by_process[trainer.accelerator.process_index]
    inputs = {}
    for name, tokens, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        columns = [torch.as_tensor(tokens[row], device=device).long() for row in mine]
        inputs[f"{name}_ids"] = pad(columns, trainer.pad_token_id, side)
        inputs[f"{name}_mask"] = pad([torch.ones_like(column) for column in columns], 0, side)
    if trainer.args.temperature_spread > 0:
        inputs["temperature"] = trainer.row_temperatures_of(batch, batch.round.prompt_ids[mine])
    with answered(trainer, None):
        logps, _ = score_by_length(trainer, inputs)
    of_mine = zip(mine, logps.float().cpu().numpy(), strict=True)
    scored = gather_object([logps[: len(completions[row])] for row, logps in of_mine])
    return dict(zip(by_process.ravel().tolist(), scored, strict=True))


def sample_rest(
    trainer, batch: GenerationBatch, prompts: list[list[int]], rest: list[int], sample: Sample
) -> list[Rollout]:
    """What comes after the kept beginnings of these rows, on all processes, as far as there is room for it."""
    rollouts, num_processes = batch.round.rollouts, trainer.accelerator.num_processes
    size = -(-len(rest) // num_processes)
    rows = np.array(rest + rest[-1:] * (size * num_processes - len(rest)))
    room = np.array([trainer.args.max_completion_length - len(rollouts[row][0]) for row in rows])
    share = slice(size * trainer.accelerator.process_index, size * (trainer.accelerator.process_index + 1))
    with rows_sampled(trainer, batch, batch.round.prompt_ids[rows], share, room):
        completions, logps = sample([prompts[row] + rollouts[row][0].tolist() for row in rows[share]])
    logps = logps or [[None] * len(tokens) for tokens in completions]
    sampled = gather_object(list(zip(completions, logps, strict=True)))[: len(rest)]
    return [
        (np.array(tokens[:most], np.int32), np.array(logps[:most], np.float32))  # None becomes NaN
        for (tokens, logps), most in zip(sampled, room[: len(rest)].tolist(), strict=True)
    ]
