"""The micro-batches that a generation batch is trained on: a [plan](plan.py) of TRL's rows, and old log-probs."""

import math

import numpy as np
import torch

from .plan import plan_micro_batches
from .scoring import is_planned, loss_mask, reference_model, score, take, trimmed


def planned_steps(trainer) -> int:
    """Micro-steps of a generation batch that are planned together."""
    return 1 if keeps_order(trainer) else shared_steps(trainer)


def shared_steps(trainer) -> int:
    """Micro-steps of a generation batch that always lie in one optimizer step, wherever it ends."""
    return math.gcd(trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps)


def keeps_order(trainer) -> bool:
    """Whether the loss depends on which rows share a micro-batch: then TRL's stay together, and are only trimmed."""
    return (
        not is_planned(trainer)
        or trainer.loss_type == "bnpo"  # a mean over the micro-batch's tokens, as is the entropy bonus
        or trainer._entropy_bonus_enabled
        or trainer.aux_loss_enabled
        or trainer.top_entropy_quantile < 1.0  # a quantile of the micro-batch
        or trainer._is_vlm  # whose rows have any number of images each
    )


def needs_old_logps(trainer) -> bool:
    """Whether a generation batch is trained on after the policy has changed, as TRL reckons it."""
    return trainer.args.gradient_accumulation_steps % trainer.window_steps != 0


def plan_generation_batch(trainer, batches: list[dict]) -> list[dict]:
    """
    Put the rows of a new generation batch into the micro-batches of a plan, without the padding that none of their
    rows needs, and add what the loss compares the policy with. The normalisers of the loss stay those of TRL's
    micro-batches.

    A micro-step may have no rows to train on, and rows that need no forward pass with gradients (`left_out`).

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.
        batches (`list[dict]`): micro-batches as TRL makes them.

    Returns:
        `list[dict]`: as many.
    """
    if not is_planned(trainer):
        return batches
    num_steps = planned_steps(trainer)
    if not keeps_order(trainer):
        lengths = _lengths(trainer, batches)
        batches = [
            micro_batch
            for start in range(0, len(batches), num_steps)
            for micro_batch in _plan(trainer, *(part[start : start + num_steps] for part in (batches, lengths)))
        ]
    batches = [_trimmed(trainer, batch) for batch in batches]
    num_on_policy = _num_on_policy(trainer)
    for step, micro_batch in enumerate(batches):
        if "completion_ids" in micro_batch:
            if step >= num_on_policy:  # of the others the loss itself computes them
                trainer.loss_steps.remember(micro_batch, score(trainer, micro_batch)[0])
            if trainer.beta != 0:
                with reference_model(trainer) as model:
                    micro_batch["ref_per_token_logps"], _ = score(trainer, micro_batch, model)
    return batches


def _num_on_policy(trainer) -> int:
    """Micro-steps of a generation batch that end before the policy changes: their log-probs are the old ones."""
    update, steps = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
    if not needs_old_logps(trainer):
        return steps
    return min(update, steps) if trainer.window_steps % update == 0 else 0


def _lengths(trainer, batches: list[dict]) -> np.ndarray:
    """
    Of each row of all ranks: tokens of prompt and completion, and whether it can change the gradient; shape
    `(micro-steps, ranks, rows, 3)`.
    """
    rows = []
    for batch in batches:
        mask = loss_mask(batch)
        needs_gradient = mask.any(dim=1)  # it is empty where a truncated completion is masked
        if trainer.beta == 0:
            needs_gradient &= (batch["advantages"] != 0).reshape(len(mask), -1).any(dim=1)
        lengths = batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1)
        rows.append(torch.stack([*lengths, needs_gradient.long()], dim=1))
    return trainer.accelerator.gather(torch.stack(rows)[None]).transpose(0, 1).cpu().numpy()


def _plan(trainer, batches: list[dict], lengths: np.ndarray) -> list[dict]:
    """The micro-batches of one window."""
    num_steps, num_ranks, num_rows, _ = lengths.shape
    prompts, completions, needs_gradient = lengths.swapaxes(0, 1).reshape(num_ranks, -1, 3).transpose(2, 0, 1)
    max_tokens = None
    if trainer.args.micro_batching == "tokens":
        max_tokens = trainer.args.max_tokens_per_micro_batch or num_rows * int(prompts.max() + completions.max())
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    each_trains = deepspeed is not None and deepspeed.zero_stage < 3
    plan = plan_micro_batches(prompts, completions, needs_gradient.astype(bool), num_steps, max_tokens, each_trains)
    window = {
        name: torch.cat([batch[name] for batch in batches]) if value.ndim else value
        for name, value in batches[0].items()
    }
    rank = trainer.accelerator.process_index
    micro_batches = []
    for trained, left_out in zip(plan.trained, plan.left_out, strict=True):
        micro_batch = {}
        if trained.size:
            micro_batch = take(window, torch.as_tensor(trained[rank]))
            # The loss is a mean over the micro-batch's rows, of which TRL's have `num_rows`.
            if trainer.loss_type not in ("cispo", "dapo", "vespo"):
                micro_batch["loss_scale"] = trained.shape[1] / num_rows
        if left_out.size:
            micro_batch["left_out"] = take(window, torch.as_tensor(left_out[rank]))
        micro_batches.append(micro_batch)
    return micro_batches


def _trimmed(trainer, micro_batch: dict) -> dict:
    micro_batch = dict(micro_batch)
    if "left_out" in micro_batch:
        micro_batch["left_out"] = trimmed(trainer, micro_batch["left_out"])
    return trimmed(trainer, micro_batch) if "completion_ids" in micro_batch else micro_batch
