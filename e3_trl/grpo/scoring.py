"""Log-probs and entropies of rows as TRL keeps them; and how much padding they are computed with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter


IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def forward(trainer, model: torch.nn.Module, rows: dict, **kwargs) -> tuple:
    """
    What TRL's loss computes first of its rows, with the same arguments.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer, at whose temperature it is computed.
        model (`torch.nn.Module`): the policy or the reference model.
        rows (`dict`): prompts, completions and images of B rows.
        **kwargs: further arguments of TRL's `_get_per_token_logps_and_entropies`.

    Returns:
        `tuple`: log-probs of shape `(B, T)`, entropies in nats of the same shape if they are asked for, and the
        router's auxiliary loss if that is.
    """
    tokens, attended = (
        torch.cat([rows[f"prompt_{name}"], rows[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    images = {name: rows.get(name) for name in IMAGES}
    return trainer._get_per_token_logps_and_entropies(
        model, tokens, attended, rows["completion_ids"].size(1), **kwargs, **images
    )


@torch.no_grad()
def score(trainer, rows: dict, reference: torch.nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    One scoring pass, without gradient, at the temperatures that the rows were sampled at.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.
        rows (`dict`): prompts, completions and images of B rows.
        reference (`torch.nn.Module`, *optional*): the reference model, which gives no entropies. `None` = the policy.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, T)`: log-probs and entropies, in nats.
    """
    with (
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        trainer.row_temperatures.at(rows.get("temperature")),
    ):
        if reference is None:
            return forward(trainer, trainer.model, rows, compute_entropy=True)[:2]
        return forward(trainer, reference, rows)[:2]


def score_by_length(trainer, rows: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`score`] any number of rows of text, `per_device_train_batch_size` at a time, those of about the same length
    together and with no more padding than they need. What is not computed for it is 0.
    """
    order = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).argsort(descending=True, stable=True)
    scored: list[torch.Tensor] = []
    for indices in order.split(trainer.args.per_device_train_batch_size):
        part = take(rows, indices)
        outputs = score(trainer, trimmed(trainer, part) if is_planned(trainer) else part)
        scored = scored or [output.new_zeros(rows["completion_ids"].shape) for output in outputs]
        for whole, output in zip(scored, outputs, strict=True):
            whole[indices, : output.size(1)] = output
    return scored[0], scored[1]


@contextmanager
def reference_model(trainer) -> Iterator[torch.nn.Module]:
    """Inside, what it yields is the reference of the KL term: a model, or the policy with another adapter or none."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
        yield trainer.model


@contextmanager
def answered(trainer, answer: Callable[..., tuple] | None) -> Iterator[None]:
    """
    Inside, whoever asks the trainer for log-probs gets what `answer` returns, which takes the arguments of TRL's
    `_get_per_token_logps_and_entropies`. `None` = they are computed.
    """
    before, trainer.logps_answer = trainer.logps_answer, answer
    try:
        yield
    finally:
        trainer.logps_answer = before


def zeros(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs) -> tuple:
    """An answer in the place of log-probs that are computed later."""
    return torch.zeros_like(input_ids[:, -logits_to_keep:], dtype=torch.float32), None, None


def loss_mask(rows: dict) -> torch.Tensor:
    """1 where a token counts in the loss: the model wrote it, and its completion is not masked; shape `(B, T)`."""
    return rows["completion_mask"] * rows.get("tool_mask", 1)


def take(rows: dict, indices: torch.Tensor) -> dict:
    """Some of the rows; what belongs to all of them stays."""
    return {name: value[indices.to(value.device)] if value.ndim else value for name, value in rows.items()}


def trimmed(trainer, rows: dict) -> dict:
    """
    The rows without the columns that are padding in all of them. What belongs to the tokens is told by its shape: a
    column of the prompts, of the completions or of both, whatever its name.
    """
    prompt_width, completion_width = rows["prompt_mask"].size(1), rows["completion_mask"].size(1)
    attended = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
    start, end = attended_columns(trainer, attended, completion_width)
    needed = {
        prompt_width + completion_width: slice(start, end),
        prompt_width: slice(start, prompt_width),
        completion_width: slice(0, end - prompt_width),
    }

    def cut(name: str, value):
        is_of_rows = isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) == len(attended)
        if not is_of_rows or value.size(1) not in needed:
            return value
        if prompt_width == completion_width == value.size(1) and name.startswith("prompt_"):
            return value[:, start:].contiguous()
        return value[:, needed[value.size(1)]].contiguous()

    return {name: cut(name, value) for name, value in rows.items()}


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
