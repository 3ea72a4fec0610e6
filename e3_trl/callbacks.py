"""TrainerCallbacks: what happens at events of the training loop, through the trainer's public attributes."""

import signal

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from .method.temperature import TemperatureSchedule
from .runs.validation import check_colocated_vllm


class PassCallback(TrainerCallback):
    """
    Begins a pass over the dataset where the training loop does, before the first batch of the pass is drawn and after
    the last one of the pass before was scored.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._is_first = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_first = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_pass(is_next=not self._is_first)
        self._is_first = False


class TemperatureCallback(TrainerCallback):
    """
    Changes the trainer's temperature from the entropy of the policy (Eq. 4).

    It acts on the entropy that [`~trl.GRPOTrainer`] logs, token-weighted over the micro-batches since the last change
    and all ranks; so it does not depend on `logging_steps`, gradient accumulation or the number of ranks. The
    temperature changes where a generation batch ends, at most once per optimizer step: the completions of one batch
    are all trained on at the temperature they were sampled at. [`E3GRPOTrainer`] adds it when
    `temperature_schedule="entropy"`.

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

    def on_substep_end(self, args, state, control, **kwargs):
        self._follow_entropy()  # where optimizer steps and generation batches do not line up, a batch may end here

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.entropy_window.num_steps += 1
        self._follow_entropy()
        if self.schedule.target_entropy is not None:
            self.trainer.add_metric("target_entropy", self.schedule.target_entropy)

    def _follow_entropy(self):
        window = self.trainer.entropy_window
        if self.trainer.window_step == 0 and window.num_steps > 0:
            self.trainer.temperature = self.schedule.step(window.mean, window.num_steps)
            window.reset()


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


class EngineCheckCallback(TrainerCallback):
    """
    Checks what a colocated vLLM is asked to hold, at the one place where the trainer has its model and tokenizer and
    has not started the engine.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer, as yet half built.
        datasets (`list`): what it trains and evaluates on.

    Raises:
        `ValueError`: see [`~e3_trl.runs.validation.check_colocated_vllm`].
    """

    def __init__(self, trainer, datasets: list):
        self.trainer = trainer
        self.datasets = datasets

    def on_init_end(self, args, state, control, **kwargs):
        if not (args.use_vllm and args.vllm_mode == "colocate"):
            return
        trainer = self.trainer
        longest = 0
        # Image and environment prompts get their final length later.
        if not trainer._is_vlm and trainer.environment_factories is None:
            for dataset in filter(lambda dataset: isinstance(dataset, Dataset), self.datasets):
                share = dataset.shard(args.world_size, args.process_index)
                for batch in share.iter(batch_size=1000):
                    longest = max(longest, *(len(ids) for ids in trainer._tokenize_prompts(batch["prompt"])[0]))
        longest = max(gather_object([longest]))  # no rank starts an engine where another cannot
        config = trainer.model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        check_colocated_vllm(args, config.tie_word_embeddings, trainer.accelerator.device.type, longest, context)
