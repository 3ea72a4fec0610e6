"""[`FastGRPOTrainer`]: TRL's GRPO, quicker and safer."""

import os
from contextlib import nullcontext

import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import GRPOTrainer

from ..runs.checkpoint import dataset_fingerprint
from ..runs.lifecycle import Lifecycle, full_disk_named, whole_weights
from ..runs.lock import held
from ..runs.optimizer import settings_kept
from ..runs.publishing import complete_model_card, only_what_is_listed
from ..runs.report import describe_run
from .adapter_sync import engine_for_adapter
from .checks import EngineCheckCallback, adapter_of, check_data, check_loading, check_quantized_base
from .config import FastGRPOConfig
from .evaluation import Batches, Evaluation, name_after_set
from .live_temperature import LiveTemperature, RowTemperatures, connect
from .loss_steps import LossSteps
from .micro_batches import plan_generation_batch
from .reward_errors import RewardGuard
from .sampler import PassCallback, PassSampler
from .scoring import answered, is_planned, zeros
from .vllm import RolloutGeneration, server_errors_named
from .watch import WatchCallback
from .weights import keep_in_float32, trained_adapter, unrounded


class FastGRPOTrainer(GRPOTrainer):
    r"""
    [`~trl.GRPOTrainer`] with another class name: the same loss and the same gradients, to rounding, and with
    `micro_batching="none"` to the last bit. What differs is what it costs, and what it survives.

    - Rows of about the same length go through the model together, without the padding that none of them needs. Old
      log-probs are those of the loss's own forward pass. Rows that cannot change the gradient only go forward.
    - A colocated vLLM gets one request per prompt, and one call for a whole evaluation.
    - The temperature can be set at any time, and reaches sampling, log-probs and entropies alike.
    - Weights that are trained in float32 stay so. TRL rounds them to bfloat16, where small updates are lost: an
      adapter beside a base in 4 bits, and the whole policy for transformers' continuous batching. Under FSDP and
      DeepSpeed it is as in TRL.
    - A run goes on exactly where its last checkpoint was; a reward function that raises, a lost vLLM server, a full
      disk or a second run in the same folder loses nothing.

    | hook | why |
    |---|---|
    | `__init__` | check the data before a model is loaded; find the places of the temperature |
    | `temperature` | a property: setting it reaches sampling, log-probs, entropies and the reference model alike |
    | `train` | the run's folder, for this run alone; resume from its last sound checkpoint; save if something fails |
    | `get_batch_samples` | no batch is left for a run that is over |
    | `_get_train_sampler`, `_get_dataloader` | prompts in TRL's order, which can be resumed |
    | `_generate_and_score_completions` | seed vLLM; what TRL scores of the rows is put off until they are planned |
    | `_generate` | a rollout function may ask for log-probs, and gets them; an evaluation stays one; no rounding |
    | `_calculate_rewards` | say what a reward function raised for; what is right in an evaluation |
    | `_buffered_inputs` | a property: rows that TRL buffers are put into micro-batches with little padding |
    | `_get_per_token_logps_and_entropies` | give the loss the forward pass that was made for it |
    | `_compute_loss` | one forward pass, then TRL's loss; micro-steps without rows, or with fewer |
    | `evaluation_loop` | evaluate at `eval_temperature`, in one engine call; log pass@1 and pass@k, by set |
    | `_save_checkpoint`, `_load_optimizer_and_scheduler` | the run's state in the checkpoint; settings that changed |
    | `_load_from_checkpoint` | the adapter that is trained, also beside others |
    | `_push_from_checkpoint`, `push_to_hub` | send what is listed, and no file that happens to lie there |
    | `save_model` | with FSDP the whole model, of which transformers saves nothing by default |
    | `create_model_card` | beside the card, `training_args.json` and `report.json`; in it, what they say |

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs:
            As in [`~trl.GRPOTrainer`], with `args` a [`FastGRPOConfig`].

    Attributes:
        num_generation_batches (`int`): generation batches of the run so far.
        evaluation ([`Evaluation`], *optional*): the evaluation that is under way. `None` = it trains.
        lifecycle ([`Lifecycle`]): what the run saves; whoever has state registers it there.
        watch ([`WatchCallback`]): what it warns of; whoever knows a sign more adds its rule there.

    Raises:
        `ValueError`: before a model is loaded, if the data do not fit the configuration.

    Example:

    ```python
    from datasets import load_dataset
    from e3_trl import FastGRPOConfig, FastGRPOTrainer, math_accuracy_reward

    trainer = FastGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=math_accuracy_reward,
        args=FastGRPOConfig(output_dir="outputs/grpo"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo"]

    num_generation_batches = 0
    sampled_step = -1
    inside_optimizer_step = False
    correctness_column = 0
    evaluation: Evaluation | None = None
    logps_answer = None

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: FastGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FastGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        if not isinstance(args, FastGRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}. Use FastGRPOConfig: it takes the same arguments, and some more."
            )
        reward_list = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        eval_list = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets = [train_dataset, *eval_list]
        check_data(args, reward_list, datasets, not (kwargs.get("environment_factory") or kwargs.get("rollout_func")))
        check_loading(args, reward_list, isinstance(model, PeftModel) or kwargs.get("peft_config") is not None)
        if isinstance(model, str):  # TRL takes it for no other
            check_quantized_base(args, kwargs.get("quantization_config"))
        engine = nullcontext()
        if args.vllm_lora_sync:
            engine = engine_for_adapter(adapter_of(model, kwargs.get("peft_config")).r)

        self.live_temperature = LiveTemperature(args.temperature)
        self.row_temperatures = RowTemperatures(self.live_temperature)
        self.loss_steps, self.passes, self.watch = LossSteps(self), PassCallback(self), WatchCallback()
        # A stream, or an environment that makes the prompts, has nothing to recognise it by.
        self.dataset_id: dict = {}
        if isinstance(train_dataset, Dataset):
            self.dataset_id = {"num_prompts": len(train_dataset), "fingerprint": dataset_fingerprint(train_dataset)}
        callbacks = [*(callbacks or []), EngineCheckCallback(self, datasets), self.passes, self.watch]
        data = train_dataset, eval_dataset, processing_class, reward_processing_classes
        brought = trained_adapter(model)
        with server_errors_named(args, model), engine:
            super().__init__(model, reward_funcs, args, *data, callbacks, **kwargs)
        self.reward_guard = RewardGuard(self)
        if not self.is_sharded:  # those want one dtype
            keep_in_float32(self.model, brought)
        if self.use_vllm:
            RolloutGeneration.adopt(self.vllm_generation, args.vllm_lora_sync)
        connect(self.live_temperature, self)
        self.lifecycle = Lifecycle(self, self.dataset_id)
        self.lifecycle.parts |= {"passes": self.passes, "temperature": self.live_temperature, "watch": self.watch}
        self.lifecycle.parts_of_process["generation_batch"] = self

    # --- what callbacks and subclasses use

    @property
    def temperature(self) -> float:
        """Temperature of sampling and of every log-prob and entropy. It may be set between generation batches."""
        return self.live_temperature.value

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.live_temperature.set(temperature)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed holds the weights, and loads and saves them in a format of its own."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def window_steps(self) -> int:
        """Micro-steps that a generation batch is trained on."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def window_step(self) -> int:
        """Micro-steps since the last generation batch, 0 = the next one generates."""
        return self._step % self.window_steps

    @property
    def samples_text(self) -> bool:
        """Whether the rows are text alone, and the trainer samples them itself: then equal prompts are equal rows."""
        return not self._is_vlm and self.environment_factories is None and self.rollout_func is None

    @property
    def fixed_settings(self) -> dict:
        """What a run cannot change on its way, by name."""
        return {name: getattr(self.args, name) for name in self.args.fixed_settings}

    def add_metric(self, name: str, value: float) -> None:
        """Log a number with TRL's own metrics, as the mean over the logging interval."""
        self._metrics["train" if self.evaluation is None else "eval"][name].append(value)

    def replace_metric(self, name: str, value: float) -> None:
        """Put a number in the place of the one that TRL has logged last by this name."""
        self._metrics["train"][name][-1] = value

    def replace_logged(self, name: str, values: list) -> None:
        """Put the values of all rows of a batch in the place of those in TRL's log of completions."""
        self._logs[name].extend(values)  # it holds one batch

    @property
    def extra_logs(self) -> dict[str, list]:
        """What reward functions have logged of the rows that they were given (`log_extra`), for the next log."""
        return self._pending_extra_logs

    @property
    def pad_token_id(self) -> int:
        """Token that rows are filled up with."""
        return self._tokenizer.pad_token_id

    def tokenize(self, prompts: list) -> list[list[int]]:
        """The tokens of each prompt, a text or a conversation."""
        return self._tokenize_prompts(prompts)[0]

    def show_column(self, name: str) -> None:
        """Let a column of the data through to the trainer, also with `remove_unused_columns`."""
        self._set_signature_columns_if_needed()
        self._signature_columns.append(name)

    # --- a generation batch

    def _get_train_sampler(self, dataset=None):
        self.passes.sampler = PassSampler.like(super()._get_train_sampler(dataset))
        return self.passes.sampler

    def _get_dataloader(self, dataset, *args, is_training=False, **kwargs):
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if is_training and loader.persistent_workers:
            # Workers that stay are given their seed once in a run, and once more where it goes on. That has to be a
            # draw of their own, or what is sampled after it would be something else.
            seed = torch.empty((), dtype=torch.int64).random_().item()
            loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
        return loader

    def _generate_and_score_completions(self, inputs):
        if self.evaluation is not None:
            return super()._generate_and_score_completions(inputs)
        corrects = self.vllm_importance_sampling_correction
        is_later = is_planned(self)  # what the loss compares with, and corrects by, is computed when rows are planned
        seeded = nullcontext()
        if self.use_vllm:
            seeded = self.vllm_generation.seeded([self.args.seed, 0, self.num_generation_batches])
        try:
            self.vllm_importance_sampling_correction = corrects and not is_later
            with seeded, answered(self, zeros if is_later else None):
                output = super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = corrects
        if is_later:
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                output.pop(name, None)
        self.num_generation_batches += 1
        self.sampled_step = self.state.global_step
        return output

    def _generate(self, prompts):
        casts = self.use_transformers_continuous_batching and not self.is_sharded
        with answered(self, None), unrounded(self.model) if casts else nullcontext():
            output = super()._generate(prompts)
        if self.evaluation is not None:
            # TRL sets it to training after continuous batching, and would take the next batch for one to train on.
            self.model.eval()
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with answered(self, None), self.row_temperatures.at(None):  # a reward may ask the policy
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.reward_guard.raise_errors()
        if self.evaluation is not None:
            self.evaluation.correctness.append(rewards_per_func[:, self.correctness_column])
        return rewards_per_func

    # --- the loss

    @property
    def _buffered_inputs(self) -> list[dict] | None:
        """Micro-batches of the generation batch that is trained on. TRL sets it to those of a new one."""
        return self._micro_batches

    @_buffered_inputs.setter
    def _buffered_inputs(self, micro_batches: list[dict] | None) -> None:
        self._micro_batches = micro_batches and plan_generation_batch(self, micro_batches)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self.logps_answer is not None:
            return self.logps_answer(*args, **kwargs)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        self.inside_optimizer_step = not self.accelerator.sync_gradients
        with self.row_temperatures.at(inputs.get("temperature")):
            return self.loss_steps.compute(model, inputs, super()._compute_loss)

    # --- evaluation

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        self._metrics["eval"].clear()  # those of `predict`, which logs none
        evaluation = self.evaluation = Evaluation(dataloader.dataset)
        seeded = ahead = nullcontext()
        if not self.is_in_train:  # the best weights, say, are of no step that the engine knows
            self._last_loaded_step = -1
        if self.use_vllm:
            seeded = self.vllm_generation.seeded([self.args.seed, 1, self.num_generation_batches])
        if self.use_vllm and self.samples_text:
            dataloader = Batches(dataloader)  # read before the loop, which then could not tell the last one
            self.gather_function = self.accelerator.gather
            prompts = self.tokenize([row["prompt"] for batch in dataloader for row in batch])
            ahead = self.vllm_generation.sampling_ahead(prompts)
        try:
            with self.live_temperature.at(self.args.eval_temperature or self.args.temperature), seeded, ahead:
                self.add_metric("temperature", self.temperature)
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            for name, value in evaluation.metrics(self.num_generations_eval).items():
                self.add_metric(name, value)
            name_after_set(self._metrics["eval"], metric_key_prefix)
        finally:
            self.evaluation = None
        return output

    # --- the run, its checkpoints and its card

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self.loss_steps.reset()  # a run that was interrupted leaves half a window, and numbers that nobody logged
        self._metrics["train"].clear()
        with held(self.args.output_dir, self.is_world_process_zero()):
            checkpoint = self.lifecycle.choose_checkpoint(resume_from_checkpoint)
            if checkpoint is None:
                self.lifecycle.begin()
            with self.lifecycle.saved_if_it_cannot_go_on():
                return super().train(checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def go_to(self, num_generation_batches: int, window_step: int) -> None:
        """Go on after so many generation batches, and so many micro-steps of the last one."""
        self.num_generation_batches, self._step = num_generation_batches, window_step
        self._last_loaded_step = -1  # whatever the step, these may be other weights than vLLM has
        self._micro_batches = None

    def state_to_save(self) -> dict:
        """What this process has of the generation batch that it is trained on."""
        return {"micro_batches": self._micro_batches}

    def restore(self, state: dict | None) -> None:
        self._micro_batches = state["micro_batches"]

    def _save_checkpoint(self, model, trial):
        # Before TRL's part, whose last file marks the checkpoint as complete.
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with full_disk_named(folder):
            self.lifecycle.save(folder)
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        with whole_weights(self):
            super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder):
        with only_what_is_listed(self.args.output_dir):
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args, **kwargs):
        with only_what_is_listed(self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = model or self.model
        # Beside adapters in folders of their own (`ref`), transformers forgets the one that is trained.
        if isinstance(model, PeftModel) and os.path.exists(os.path.join(resume_from_checkpoint, ADAPTER_CONFIG_NAME)):
            model.load_adapter(resume_from_checkpoint, model.active_adapters[0], is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with settings_kept(self):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.lifecycle.resume(checkpoint)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        # The Hub refuses a card that names a local file as its dataset.
        on_hub = dataset_name is not None and not os.path.exists(dataset_name)
        super().create_model_card(model_name, dataset_name if on_hub else None, tags)
        if self.is_world_process_zero():
            describe_run(self)
            complete_model_card(self.args.output_dir)
