"""PREPO in a generation batch: which prompts it has, and how much its completions count."""

import numpy as np
import torch
from trl.trainer.utils import pad

from ..method.prepo import entropy_weights, prompt_perplexity, select_by_perplexity, token_mean
from .batch import GenerationBatch, read_examples
from .scoring import loss_mask, score, score_rows


def select_prompts(trainer, batch: GenerationBatch) -> None:
    """
    Choose the batch's prompts among its candidates by their perplexity, and give them their budgets.

    They keep the candidates' order: in the order of perplexity, the last process would always have the longest work.
    """
    candidates = batch.prompt_ids
    num_processes = trainer.accelerator.num_processes
    share = np.resize(candidates, (num_processes, -(-len(candidates) // num_processes)))[batch.process_index]
    perplexity = trainer.accelerator.gather(_perplexity(trainer, share))
    perplexity = perplexity[: len(candidates)].float().cpu().numpy()
    progress = trainer.state.global_step / trainer.state.max_steps
    chosen = np.sort(select_by_perplexity(perplexity, len(batch.group_ids) // trainer.num_generations, progress))
    trainer.add_metric("prompt_perplexity/candidates", float(perplexity.mean()))
    trainer.add_metric("prompt_perplexity/selected", float(perplexity[chosen].mean()))
    batch.begin_with(trainer._train_sampler.rows(candidates[chosen]), trainer.train_dataset)


def _perplexity(trainer, prompt_ids: np.ndarray) -> torch.Tensor:
    """Of each prompt's tokens after the first, at temperature 1; shape `(len(prompt_ids),)`."""
    examples = read_examples(trainer.train_dataset, prompt_ids, ["prompt"])
    prompt_ids, *_ = trainer._tokenize_prompts([example["prompt"] for example in examples])
    tokens = [torch.tensor(ids, device=trainer.accelerator.device) for ids in prompt_ids]
    input_ids = pad(tokens, trainer._tokenizer.pad_token_id)
    mask = pad([torch.ones_like(ids) for ids in tokens])
    with trainer.live_temperature.at(1.0):
        logps, _ = score(trainer, input_ids, mask, input_ids.size(1) - 1)
    return prompt_perplexity(logps, mask[:, 1:])


def weigh_by_entropy(trainer, batch: GenerationBatch, output: dict) -> None:
    """Multiply each completion's advantage by its entropy relative to the batch's."""
    logps, entropies = score_rows(trainer, output)
    if batch.owes_old_logps:
        output["old_per_token_logps"], batch.owes_old_logps = logps, False
    weights = entropy_weights(trainer.accelerator.gather(token_mean(entropies, loss_mask(output))))
    trainer.add_metric("entropy_weight/max", weights.max().item())
    batch.advantages = batch.advantages * weights
