"""The TrainerCallback that drives the temperature schedule."""

from transformers import TrainerCallback

from .temperature import TemperatureSchedule


class TemperatureCallback(TrainerCallback):
    """
    Changes the trainer's temperature from the entropy of the policy, once per generation batch (Eq. 4).

    It acts on the entropy that [`~trl.GRPOTrainer`] logs, token-weighted over the whole generation batch and all
    ranks, at the end of the optimizer step that finishes the batch; so it does not depend on `logging_steps`, gradient
    accumulation or the number of ranks. [`E3GRPOTrainer`] adds it when `temperature_schedule="entropy"`.

    Args:
        trainer ([`E3GRPOTrainer`]):
            The trainer: its `entropy_window` is read, its `temperature` is set.
        schedule ([`TemperatureSchedule`]):
            Eq. 4 and 5.
    """

    def __init__(self, trainer, schedule: TemperatureSchedule):
        self.trainer = trainer
        self.schedule = schedule

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule.max_steps = state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        window = self.trainer.entropy_window
        window.num_steps += 1
        # The completions of one generation batch are all trained on at the temperature they were sampled at.
        if self.trainer.window_step == 0:
            self.trainer.temperature = self.schedule.step(window.mean, window.num_steps)
            window.reset()
        if self.schedule.target_entropy is not None:
            self.trainer._metrics["train"]["target_entropy"].append(self.schedule.target_entropy)
