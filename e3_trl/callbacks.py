"""TrainerCallbacks: the temperature schedule, and the checks that need a tokenizer but no engine."""

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from .method.temperature import TemperatureSchedule
from .runs.validation import check_colocated_vllm


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
        self.schedule = trainer._temperature_schedule = schedule  # for it the trainer keeps entropies and checkpoints

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


class EngineCheckCallback(TrainerCallback):
    """
    Checks what a colocated vLLM is asked to hold, at the one place where the trainer has its model and tokenizer and
    has not started the engine.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer, as yet half built.
        datasets (`list`): what it trains and evaluates on.

    Raises:
        `ValueError`: see [`~e3_trl.validation.check_colocated_vllm`].
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
