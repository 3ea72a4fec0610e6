"""TrainerCallbacks of E3: what happens at events of the training loop, through the trainer's public attributes."""

from dataclasses import asdict

from transformers import TrainerCallback

from .checks import warn_of_a_first_pass_alone
from .grpo.watch import Rule
from .method.temperature import EntropyWindow, TemperatureSchedule


class TemperatureCallback(TrainerCallback):
    """
    Changes the trainer's temperature from the entropy of the policy (Eq. 4).

    It acts on the entropy that is logged, token-weighted over the micro-batches since the last change and all ranks;
    so it does not depend on `logging_steps`, gradient accumulation or the number of ranks. The temperature changes
    where a generation batch ends, at most once per optimizer step: the completions of one batch are all trained on at
    the temperature they were sampled at. [`E3GRPOTrainer`] adds it when `temperature_schedule="entropy"`.

    Args:
        trainer ([`E3GRPOTrainer`]):
            The trainer: its `temperature` is set, its entropy listened to, and its checkpoints hold the schedule.
        schedule ([`TemperatureSchedule`]):
            Eq. 4 and 5.

    Attributes:
        window ([`EntropyWindow`]): entropy of the policy since the last change.
    """

    def __init__(self, trainer, schedule: TemperatureSchedule):
        self.trainer = trainer
        self.schedule = schedule
        self.window = EntropyWindow()
        trainer.loss_steps.entropy_listeners.append(lambda entropy, tokens: self.window.add(entropy, tokens))
        # The temperature is the schedule's from now on.
        trainer.lifecycle.parts.pop("temperature", None)
        trainer.lifecycle.parts["temperature_schedule"] = self

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule.max_steps = state.max_steps

    def on_substep_end(self, args, state, control, **kwargs):
        self._follow_entropy()  # where optimizer steps and generation batches do not line up, a batch may end here

    def on_step_end(self, args, state, control, **kwargs):
        self.window.num_steps += 1
        self._follow_entropy()
        if self.schedule.target_entropy is not None:
            self.trainer.add_metric("target_entropy", self.schedule.target_entropy)

    def _follow_entropy(self):
        if self.trainer.window_step == 0 and self.window.num_steps > 0:
            self.trainer.temperature = self.schedule.step(self.window.mean, self.window.num_steps)
            self.window.reset()

    def state_to_save(self) -> dict:
        """Where the schedule is, where it began, and the part of a window that a checkpoint lies in."""
        began_at = self.trainer.args.temperature
        return {"schedule": self.schedule.state_dict(), "window": asdict(self.window), "began_at": began_at}

    def restore(self, state: dict | None) -> None:
        """Go on where the temperature was, unless the settings say otherwise by now."""
        args, schedule = self.trainer.args, self.schedule
        if state is None:
            schedule.step_count = self.trainer.state.global_step  # annealing keeps the run's count
            return
        if state["began_at"] != args.temperature:
            raise ValueError(
                f"temperature is {args.temperature}, and was {state['began_at']} when the checkpoint was saved: the "
                f"schedule, which began there, is at {state['schedule']['temperature']:.3g} now. Set it to "
                f"{state['began_at']}, or temperature_schedule to 'constant'."
            )
        schedule.load_state_dict(state["schedule"])
        if args.temperature_target_entropy is not None:
            schedule.initial_entropy = args.temperature_target_entropy
        self.trainer.temperature = schedule.temperature
        self.window = EntropyWindow(**state["window"])


def clamp_rules(temperature_min: float, temperature_max: float) -> list[Rule]:
    """What [`~e3_trl.grpo.watch.WatchCallback`] warns of where a schedule moves the temperature between these."""
    return [
        (
            "temperature",
            lambda value: value >= temperature_max * (1 - 1e-9),  # a mean over several steps is rounded
            f"the temperature was at temperature_max ({temperature_max}): the entropy that is missing is not to be "
            "had by sampling hotter. Set a lower temperature_target_entropy, or a lower annealing_factor.",
        ),
        (
            "temperature",
            lambda value: value <= temperature_min * (1 + 1e-9),
            f"the temperature was at temperature_min ({temperature_min}), and the entropy above its target. Set a "
            "higher temperature_target_entropy, or a lower temperature_min.",
        ),
    ]


class TelemetryCallback(TrainerCallback):
    """
    Logs the temperature that each optimizer step was sampled and trained at, says when a run is too short for budgets,
    and writes what is left for `rollouts.jsonl` when the training ends.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        sampler = self.trainer.passes.sampler
        if state.is_world_process_zero and getattr(sampler, "budget_schedule", None) is not None:
            steps_per_batch = self.trainer.window_steps / args.gradient_accumulation_steps
            warn_of_a_first_pass_alone(args, state.max_steps, sampler.num_batches * steps_per_batch)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.add_metric("temperature", self.trainer.temperature)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.rollout_log.flush()
