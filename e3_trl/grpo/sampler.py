"""The order of the prompts, pass by pass, from which a run can go on exactly."""

from collections.abc import Iterator

import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler


class PassSampler(RepeatSampler):
    """
    TRL's [`~trl.trainer.utils.RepeatSampler`], pass for pass the same stream. It can be resumed, which RepeatSampler
    cannot: the order of the prompts follows from the seed and the pass alone. It has no `set_epoch`, which
    transformers and accelerate would call at times of their own.

    Attributes:
        epoch (`int`): passes over the dataset before this one.
        num_batches (`int`): generation batches of a pass.
    """

    epoch = 0

    @classmethod
    def like(cls, sampler: RepeatSampler, **kwargs) -> "PassSampler":
        """This sampler in the place of TRL's; `kwargs` are the arguments that it has not."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(**{name: getattr(sampler, name) for name in names}, **kwargs)

    @property
    def num_batches(self) -> int:
        return self.num_samples // self.batch_size

    def begin_pass(self, number: int) -> None:
        """Begin a pass, counted from 0."""
        self.epoch = number

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            # RepeatSampler draws one permutation per pass from a generator that it never resets.
            self.generator.manual_seed(self.generator.initial_seed())
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()

    def state_to_save(self, num_batches: int) -> dict[str, int]:
        """
        The sampler's place after `num_batches` generation batches of the run: `pass`, and `position` (generation
        batches of this pass), which is for the reader: it follows from the run's step.
        """
        return {"pass": self.epoch, "position": num_batches - self.epoch * self.num_batches}


class PassCallback(TrainerCallback):
    """
    Begins a pass over the dataset where the training loop does, before the first batch of the pass is drawn and after
    the last one of the pass before was scored.

    Args:
        trainer ([`FastGRPOTrainer`]): the trainer.

    Attributes:
        sampler ([`PassSampler`], *optional*): the sampler of the run, `None` for a stream.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.sampler: PassSampler | None = None
        self._is_first = True

    @property
    def number(self) -> int:
        """Passes over the dataset before this one; 0 for a stream."""
        return 0 if self.sampler is None else self.sampler.epoch

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_first = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        """A new pass is what the batches say, which a run that goes on has had, or what the loop says."""
        if self.sampler is not None:
            finished = self.trainer.num_generation_batches - (self.trainer.window_step > 0)
            number = finished // self.sampler.num_batches
            self.sampler.begin_pass(max(number, self.sampler.epoch + (not self._is_first)))
        self._is_first = False

    def state_to_save(self) -> dict:
        return {} if self.sampler is None else self.sampler.state_to_save(self.trainer.num_generation_batches)

    def restore(self, state: dict | None) -> None:
        if self.sampler is not None:
            self.sampler.epoch = (state or {}).get("pass", 0)
