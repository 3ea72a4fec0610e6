"""Log-probs and entropies under the policy, outside of the loss."""

import torch
from trl.models.utils import disable_gradient_checkpointing


@torch.no_grad()
def score(
    trainer, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One scoring pass of the policy, without gradient, at the trainer's temperature.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        input_ids (`torch.Tensor` of shape `(B, T)`): texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 1 where they have tokens.
        num_tokens (`int`): tokens at their end that are scored.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, num_tokens)`: log-probs and entropies, in nats.
    """
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            input_ids,
            attention_mask,
            num_tokens,
            trainer.args.per_device_train_batch_size,
            compute_entropy=True,
        )
    return logps, entropies
