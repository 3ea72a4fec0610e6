"""What a scheduler's signal does."""

import signal

from accelerate.utils import gather_object
from transformers import TrainerCallback


class TerminationCallback(TrainerCallback):
    """
    Saves a checkpoint and ends the training after the optimizer step in which one of the processes got SIGTERM, as
    schedulers send it before they kill. transformers' `enable_jit_checkpoint` saves in the middle of a step, and each
    process when its own timer says so.

    Attributes:
        has_begun (`bool`): whether all is loaded and the training under way.
        is_terminated (`bool`): whether the training was ended so, on all processes alike.
    """

    def __init__(self):
        self.has_begun = self.is_terminated = self._received = False

    def _note(self, number, frame):
        self._received = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_begun = True
        self.is_terminated = self._received = False
        self._before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL  # None = not Python's own

    def on_step_end(self, args, state, control, **kwargs):
        if any(gather_object([self._received])):
            self.is_terminated = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        if self.is_terminated:
            state.best_model_checkpoint = None  # for which this one would be deleted; it stands in the checkpoint

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.is_terminated:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._before)
