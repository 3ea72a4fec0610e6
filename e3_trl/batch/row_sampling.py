"""What rows are sampled with that is their own: a temperature, and how far they may go."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .batch import GenerationBatch


@contextmanager
def rows_sampled(
    trainer, batch: GenerationBatch, prompt_ids: np.ndarray, share: slice, room: np.ndarray | None = None
) -> Iterator[None]:
    """
    Inside, rows of these prompts are sampled, by vLLM or transformers.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
        batch ([`GenerationBatch`]): the batch, whose prompts have their temperatures (`temperature_spread`).
        prompt_ids (`np.ndarray` of shape `(N,)`): prompt of each row, over all processes.
        share (`slice`): this process's rows.
        room (`np.ndarray` of shape `(N,)`, *optional*):
            Tokens that each row may have at most. transformers, which has one limit for all, goes on to the largest.
            `None` = `max_completion_length`.
    """
    of_rows = {} if room is None else {"max_tokens": room}
    if trainer.args.temperature_spread > 0:
        of_rows["temperature"] = trainer.temperature_of(batch, prompt_ids)
    with trainer.row_temperatures.at(trainer.row_temperatures_of(batch, prompt_ids[share])):
        if trainer.use_vllm:
            with trainer.vllm_generation.rows_with(**of_rows):
                yield
            return
        if room is None:
            yield
            return
        config, kwargs = trainer.generation_config, trainer.generation_kwargs
        before = config.max_new_tokens, kwargs["max_new_tokens"]
        config.max_new_tokens = kwargs["max_new_tokens"] = int(room[share].max())
        try:
            yield
        finally:
            config.max_new_tokens, kwargs["max_new_tokens"] = before
