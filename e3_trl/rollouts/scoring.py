"""Log-probs and entropies under the policy, outside of the loss; and how much padding they are computed with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.models.utils import disable_gradient_checkpointing

from .batch import GenerationBatch


IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


@torch.no_grad()
def score(
    trainer, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int, **images
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One scoring pass of the policy, without gradient, at the trainer's temperature.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        input_ids (`torch.Tensor` of shape `(B, T)`): texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 1 where they have tokens.
        num_tokens (`int`): tokens at their end that are scored.
        **images: what TRL hands a model beside them.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, num_tokens)`: log-probs and entropies, in nats.
    """
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            input_ids,
            attention_mask,
            num_tokens,
            batch_size=trainer.args.per_device_train_batch_size,
            compute_entropy=True,
            **images,
        )
    return logps, entropies


def score_rows(trainer, rows: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """[`score`] the completions of rows as TRL keeps them."""
    tokens, attended = (
        torch.cat([rows[f"prompt_{name}"], rows[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    images = {name: rows[name] for name in IMAGES if rows.get(name) is not None}
    with trainer.row_temperatures.at(rows.get("temperature")):
        return score(trainer, tokens, attended, rows["completion_ids"].size(1), **images)


def loss_mask(rows: dict) -> torch.Tensor:
    """1 where a token counts in the loss: the model wrote it, and its completion is not masked; shape `(B, T)`."""
    return rows["completion_mask"] * rows.get("tool_mask", 1)


@contextmanager
def without_old_logps(trainer, batch: GenerationBatch) -> Iterator[None]:
    """
    Inside, TRL computes no old log-probs of the rows it samples: those of the steps before the policy changes are what
    the loss computes anyway, and the others are [scored](micro_batches.py) when it is known which rows they are.
    """
    corrects = trainer.vllm_importance_sampling_correction
    if is_planned(trainer):
        batch.defers_old_logps = needs_old_logps(trainer)
        trainer.vllm_importance_sampling_correction = False
    try:
        yield
    finally:
        trainer.vllm_importance_sampling_correction = corrects


def scoring_pass(
    trainer,
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    batch_size: int,
    compute_entropy: bool = False,
    **images,
) -> tuple[torch.Tensor, torch.Tensor | None, None] | None:
    """
    What TRL's `_get_per_token_logps_and_entropies` gives, `batch_size` rows at a time: texts of about the same length
    together, each micro-batch with no more padding than it needs. Zero where there is nothing to score, and of old
    log-probs that are deferred.

    Returns:
        Log-probs, entropies and no auxiliary loss; `None` = it is left to TRL, as all that has images is.
    """
    batch = trainer._batch
    # TRL asks for them first, then for those of the reference model, which may be this one without its adapter.
    is_first = batch is not None and not batch.owes_old_logps and model is trainer.model and not compute_entropy
    if is_first and batch.defers_old_logps:
        batch.owes_old_logps = True
        return torch.zeros_like(input_ids[:, -num_tokens:], dtype=torch.float32), None, None
    if any(value is not None for value in images.values()):
        return None
    scored: list[torch.Tensor] = []
    order = attention_mask.sum(dim=1).argsort(descending=True, stable=True)
    first_scored = input_ids.size(1) - num_tokens
    for rows in order.split(batch_size):
        start, end = attended_columns(trainer, attention_mask[rows], num_tokens)
        with trainer.row_temperatures.of(rows):
            outputs = trainer._get_per_token_logps_and_entropies(
                model,
                input_ids[rows, start:end],
                attention_mask[rows, start:end],
                end - first_scored,
                compute_entropy=compute_entropy,
            )
        outputs = [output for output in outputs if output is not None]
        if not scored:
            scored = [output.new_zeros(len(order), num_tokens) for output in outputs]
        for whole, output in zip(scored, outputs, strict=True):
            whole[rows, : output.size(1)] = output
    return scored[0], scored[1] if compute_entropy else None, None


def needs_old_logps(trainer) -> bool:
    """Whether a generation batch is trained on after the policy has changed, as TRL reckons it."""
    return trainer.args.gradient_accumulation_steps % trainer.window_steps != 0


def is_planned(trainer) -> bool:
    """Whether anything is done to the padding and the micro-batches of TRL."""
    return trainer.args.micro_batching != "none" and padding_is_inert(trainer.model.config)


def padding_is_inert(config) -> bool:
    """
    Whether a row's log-probs are the same with less padding. With some extensions of the context (dynamic NTK,
    LongRoPE) the positions' frequencies depend on how wide the batch is.
    """
    return not {"dynamic", "longrope"} & _rope_types(config)


def _rope_types(config) -> set[str]:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    return {parameters.get("rope_type", "default") for parameters in per_layer_type or [rope] if parameters}


def attended_columns(trainer, attention_mask: torch.Tensor, num_tokens: int) -> tuple[int, int]:
    """
    First and last column, exclusive, that rows need, of which the last `num_tokens` are scored. At least one column
    before and one of those is left, and widths keep to `pad_to_multiple_of`.
    """
    width = attention_mask.size(1)
    columns = attention_mask.any(dim=0).nonzero()
    first_scored = width - num_tokens
    start = min(int(columns[0]), first_scored - 1)
    end = max(int(columns[-1]) + 1, first_scored + 1)
    if not _rope_types(trainer.model.config):
        start = 0  # positions are counted from the first column, padding or not
    multiple = trainer.pad_to_multiple_of or 1
    start = first_scored - min(first_scored, -(-(first_scored - start) // multiple) * multiple)
    end = min(width, first_scored + -(-(end - first_scored) // multiple) * multiple)
    return start, end
