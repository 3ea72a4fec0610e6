"""[`E3GRPOTrainer`]: GRPO with dynamic rollout budgets and a temperature schedule."""

import os
import textwrap
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from .callbacks import EngineCheckCallback, PassCallback, TemperatureCallback
from .config import E3GRPOConfig
from .method.budget_rules import load_rule
from .method.difficulty import DifficultyTracker
from .method.temperature import EntropyWindow, TemperatureSchedule, spread_temperatures
from .rollouts.advantages import compare
from .rollouts.batch import PROMPT_ID, GenerationBatch, IndexedCollator, IndexedPrompts
from .rollouts.dynamic_sampling import keep_informative_groups
from .rollouts.evaluation import Evaluation
from .rollouts.length_bias import shorten
from .rollouts.loss_window import LossWindow
from .rollouts.micro_batches import plan_generation_batch
from .rollouts.pilot import sample_in_two_parts
from .rollouts.prepo import select_prompts, weigh_by_entropy
from .rollouts.prompts import is_text, share_copies, with_copies, without_copies
from .rollouts.reward_errors import RewardGuard
from .rollouts.rollout_func import check_rollouts
from .rollouts.sampler import RolloutBudgetSampler
from .rollouts.scoring import is_planned, scoring_pass, without_old_logps
from .rollouts.telemetry import RolloutLog, log_rollouts
from .rollouts.temperature import LiveTemperature, RowTemperatures, connect
from .rollouts.vllm import RolloutGeneration, server_errors_named
from .runs.checkpoint import dataset_fingerprint
from .runs.dashboards import DASHBOARDS, DashboardCallback
from .runs.describe import describe_run
from .runs.publishing import complete_model_card
from .runs.state import (
    begin_run,
    choose_checkpoint,
    full_disk_named,
    resume_run,
    save_run,
    saved_if_it_cannot_go_on,
)
from .runs.validation import check_run, difficulty_reward_index, initial_difficulty


class E3GRPOTrainer(GRPOTrainer):
    r"""
    Trainer for E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573).

    It differs from [`~trl.GRPOTrainer`] in two things, each of which can be switched off: the number of completions
    per prompt follows the prompt's difficulty (`rollout_allocation`), and the temperature follows the policy's entropy
    (`temperature_schedule`). With both off, gradients equal GRPOTrainer's to rounding, for micro-batches are put
    together anew; with `micro_batching="none"` to the last bit. More can be switched on: a length bias for easy
    prompts (`length_bias_coef`), DAPO's dynamic sampling (`dynamic_sampling`), PREPO's choice of prompts by perplexity
    (`prompt_selection_ratio`) and weighting by entropy (`entropy_weighting`), and a temperature by difficulty
    (`temperature_spread`).

    What happens to a generation batch stands in `_generate_and_score_completions`, from top to bottom. What is
    overridden, each around a call of `super()`:

    | hook | why |
    |---|---|
    | `__init__` | check the data before a model is loaded; find the places of the temperature |
    | `temperature` | a property: setting it reaches sampling, log-probs, entropies and the reference model alike |
    | `train` | the run's folder; resume from its last sound checkpoint; save if server or reward function fail |
    | `get_batch_samples` | no batch is left for a run that is over |
    | `_get_dataloader`, `_set_signature_columns_if_needed` | give every prompt an id, which the trainer alone sees |
    | `_get_train_sampler` | repeat each prompt as often as its budget says (Algorithm 1) |
    | `_generate_and_score_completions` | the pipeline of a generation batch; advantages for groups of any size |
    | `_generate` | seed vLLM; check what a rollout function returns; sample in rounds (DAPO, a pilot) |
    | `_tokenize_prompts` | a prompt is tokenised once for all its rows |
    | `_generate_single_turn` | one engine call for all prompts of an evaluation |
    | `_calculate_rewards` | keep the rewards of all processes; score each round once; say what a function raised for |
    | `_prepare_inputs` | put a generation batch's rows into micro-batches with little padding |
    | `_get_per_token_logps_and_entropies` | score by length; keep the loss's log-probs, which are the old ones too |
    | `_compute_loss` | micro-steps without rows, or with fewer; the entropy of all for the temperature schedule |
    | `evaluation_loop` | evaluate at `eval_temperature`; log pass@1 and pass@k |
    | `_save_checkpoint`, `_load_optimizer_and_scheduler` | E3's state in the checkpoint |
    | `create_model_card` | beside the card, `training_args.json` and `report.json`; in it, what they say |

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs:
            As in [`~trl.GRPOTrainer`], with `args` an [`E3GRPOConfig`].

    Raises:
        `ValueError`: before a model is loaded, if the data do not fit the configuration.

    Example:

    ```python
    from datasets import load_dataset
    from e3_trl import E3GRPOConfig, E3GRPOTrainer, math_accuracy_reward

    trainer = E3GRPOTrainer(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        reward_funcs=math_accuracy_reward,
        args=E3GRPOConfig(output_dir="outputs/e3", loss_type="grpo", gradient_accumulation_steps=64),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "e3"]
    _name = "E3"
    _paper = {
        "title": "Enhancing Efficiency and Exploration in Reinforcement Learning for LLMs",
        "id": "2505.18573",
        "citation": textwrap.dedent("""\
            @article{liao2025enhancing,
                title        = {{Enhancing Efficiency and Exploration in Reinforcement Learning for LLMs}},
                author       = {Mengqi Liao and others},
                year         = 2025,
                eprint       = {arXiv:2505.18573},
            }"""),
    }

    run_id: str | None = None
    num_generation_batches = 0
    saved_step, sampled_step = 0, -1
    inside_optimizer_step = False
    _train_sampler: RolloutBudgetSampler | None = None
    _batch: GenerationBatch | None = None
    _evaluation: Evaluation | None = None

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: E3GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = E3GRPOConfig(f"{name.split('/')[-1]}-E3")
        reward_list = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        eval_list = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        fixed_columns = not (kwargs.get("environment_factory") or kwargs.get("rollout_func"))
        check_run(args, reward_list, train_dataset, eval_list, fixed_columns, bool(kwargs.get("tools")))

        self.live_temperature = LiveTemperature(args.temperature)
        self.row_temperatures = RowTemperatures(self.live_temperature)
        self.entropy_window, self.loss_window = EntropyWindow(), LossWindow(self)
        # A stream, or an environment that makes the prompts, has no index: no difficulty, nothing to recognise it by.
        self.difficulty_tracker: DifficultyTracker | None = None
        self.dataset_id: dict = {}
        if isinstance(train_dataset, Dataset):
            difficulty = initial_difficulty(args.difficulty_column, train_dataset)
            self.difficulty_tracker = DifficultyTracker(
                len(train_dataset), difficulty, args.success_decay, args.success_prior
            )
            self.dataset_id = {"num_prompts": len(train_dataset), "fingerprint": dataset_fingerprint(train_dataset)}
        self.rollout_log = RolloutLog(args.output_dir)
        checks = EngineCheckCallback(self, [train_dataset, *eval_list])
        data = train_dataset, eval_dataset, processing_class, reward_processing_classes
        with server_errors_named(args, model):
            super().__init__(
                model, reward_funcs, args, *data, [*(callbacks or []), checks, PassCallback(self)], **kwargs
            )
        self.reward_guard = RewardGuard(self)
        self.difficulty_reward_index = difficulty_reward_index(args, self.reward_func_names)
        if self.use_vllm:
            RolloutGeneration.adopt(self.vllm_generation)
        connect(self.live_temperature, self)
        if args.temperature_schedule == "entropy":
            schedule = args.make_temperature_schedule(self.model.config.get_text_config().vocab_size)
            self.add_callback(TemperatureCallback(self, schedule))
        if set(DASHBOARDS) & set(args.report_to):
            self.callback_handler.callbacks.insert(0, DashboardCallback(self))  # it has to come before theirs

    # --- what callbacks, and the methods in `rollouts/`, use

    @property
    def temperature(self) -> float:
        """Temperature of sampling and of every log-prob and entropy. It may be set between generation batches."""
        return self.live_temperature.value

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.live_temperature.set(temperature)

    @property
    def temperature_schedule(self) -> TemperatureSchedule | None:
        """What moves the temperature: that of the [`TemperatureCallback`]. `None` = it is constant."""
        callbacks = self.callback_handler.callbacks
        return next((callback.schedule for callback in callbacks if isinstance(callback, TemperatureCallback)), None)

    @property
    def window_steps(self) -> int:
        """Micro-steps that a generation batch is trained on."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def window_step(self) -> int:
        """Micro-steps since the last generation batch, 0 = the next one generates."""
        return self._step % self.window_steps

    def add_metric(self, name: str, value: float) -> None:
        """Log a number with TRL's own metrics, as the mean over the logging interval."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def begin_pass(self, is_next: bool = False) -> None:
        """Put new ranks and wider bounds in force if it is a new pass: the batches say so, or the loop (`is_next`)."""
        sampler = self._train_sampler
        if sampler is not None:
            finished = self.num_generation_batches - (self.window_step > 0)
            number = finished // sampler.num_batches
            sampler.begin_pass(max(number, sampler.epoch + is_next))

    def difficulty_of(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> np.ndarray:
        """Difficulty that the batch's budgets came from, in (0, 1], NaN = not known; of the shape of `prompt_ids`."""
        return self.difficulty_tracker.difficulty[prompt_ids] if batch.indexed else np.full(len(prompt_ids), np.nan)

    def temperature_of(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> np.ndarray:
        """Temperature of each of the batch's prompts, of the shape of `prompt_ids`."""
        args = self.args
        difficulty = self.difficulty_of(batch, prompt_ids)
        return spread_temperatures(
            difficulty, self.temperature, args.temperature_spread, args.temperature_min, args.temperature_max
        )

    # --- a generation batch: choose prompts, give budgets, sample, keep, score, count, compare, weigh

    def _get_train_sampler(self, dataset=None):
        rule = self.args.rollout_allocation
        has_budgets = rule not in ("uniform", "pilot") and self.difficulty_tracker is not None
        # Which of them are sampled is not known yet when the dataloader reads them.
        num_candidates = self.args.num_candidates if self.args.prompt_selection_ratio < 1 else None
        self._train_sampler = RolloutBudgetSampler.like(
            super()._get_train_sampler(dataset),
            difficulty=self.difficulty_tracker,
            **({"budget_schedule": self.args.make_budget_schedule(), "rule": load_rule(rule)} if has_budgets else {}),
            num_candidates=num_candidates,
        )
        return self._train_sampler

    def _get_dataloader(self, dataset, *args, is_training=False, **kwargs):
        collator = self.data_collator
        if is_training and self.difficulty_tracker is not None:
            dataset, self.data_collator = IndexedPrompts(dataset), IndexedCollator(collator)
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if PROMPT_ID not in self._signature_columns:
            self._signature_columns.append(PROMPT_ID)

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._generation_batch(inputs) as batch:
            if self.args.prompt_selection_ratio < 1:
                select_prompts(self, batch)
            with without_old_logps(self, batch):
                # `_generate` samples and keeps what is trained on; `_calculate_rewards` scores.
                output = super()._generate_and_score_completions(batch.round.examples)
            if self.args.temperature_spread > 0:
                output["temperature"] = self.row_temperatures.of_rows
            log_rollouts(self, batch)
            batch.shaped_rewards = batch.of_kept(batch.rewards).clone()
            if self.args.length_bias_coef > 0:
                shorten(self, batch)
            compare(self, batch)
            if self.args.entropy_weighting:
                weigh_by_entropy(self, batch, output)
            if batch.owes_old_logps:
                del output["old_per_token_logps"]
            output["advantages"] = batch.advantages[batch.share]
            self._logs["advantages"].extend(batch.advantages.tolist())
        self.num_generation_batches += 1
        self.sampled_step = self.state.global_step
        return output

    @contextmanager
    def _generation_batch(self, inputs):
        index = self.num_generation_batches
        self._batch = GenerationBatch.begin(index, inputs, self.num_generations, self.accelerator)
        try:
            yield self._batch
        finally:
            self._batch = None
            self.row_temperatures.set(None)

    def _generate(self, prompts):
        batch = self._batch
        if batch is None:
            return super()._generate(share_copies(self, prompts))
        if self.args.dynamic_sampling:
            output = keep_informative_groups(self, batch, prompts)
        elif self.args.rollout_allocation == "pilot":
            output = sample_in_two_parts(self, batch, prompts)
        else:
            output = self.sample_round(prompts)
        self._set_row_temperatures(batch, batch.of_kept(batch.sampled_ids)[batch.share])
        return output

    def _set_row_temperatures(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> None:
        if self.args.temperature_spread > 0:
            temperatures = self.temperature_of(batch, prompt_ids)
            self.row_temperatures.set(torch.tensor(temperatures, dtype=torch.float32, device=self.accelerator.device))

    def sample_round(self, prompts: list) -> tuple:
        """What TRL's `_generate` returns, for the newest round of the batch."""
        batch, ids = self._batch, self._batch.round.prompt_ids
        self._set_row_temperatures(batch, ids[batch.share_of(ids)])
        seeded = nullcontext()
        if self.use_vllm:
            key = [self.args.seed, 0, batch.index, len(batch.rounds)]
            temperatures = self.temperature_of(batch, ids) if self.args.temperature_spread > 0 else None
            seeded = self.vllm_generation.seeded(key, temperatures)
        with seeded:
            output = super()._generate(share_copies(self, prompts))
        prompt_ids, completion_ids, tool_mask, *_ = output
        if self.rollout_func is not None and batch.indexed and self.args.rollout_allocation != "uniform":
            check_rollouts(self._tokenize_prompts(prompts)[0], prompt_ids)
        lengths = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(mask) for mask in tool_mask]
        batch.round.lengths = self.accelerator.gather(torch.tensor(lengths, device=self.accelerator.device))
        return output

    def _tokenize_prompts(self, prompts):
        distinct, num_copies = without_copies(self, prompts)
        return with_copies(super()._tokenize_prompts(distinct), num_copies)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        batch = self._batch
        if batch is not None and batch.round.rewards is not None:  # scored already, to know what to sample and keep
            return batch.of_kept(batch.rewards)
        with self.row_temperatures.at(None):  # a reward may ask the policy
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.reward_guard.raise_errors()
        if batch is not None:
            batch.round.rewards = rewards_per_func
        elif self._evaluation is not None:
            self._evaluation.correctness.append(rewards_per_func[:, self.difficulty_reward_index])
        return rewards_per_func

    # --- the loss

    def _prepare_inputs(self, inputs):
        num_batches = self.num_generation_batches
        micro_batch = super()._prepare_inputs(inputs)
        if self.num_generation_batches == num_batches or not is_planned(self):
            return micro_batch
        plan_generation_batch(self)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, batch_size=None, **kwargs):
        if batch_size is not None and is_planned(self):
            scored = scoring_pass(self, model, input_ids, *args, batch_size=batch_size, **kwargs)
            if scored is not None:
                return scored
        output = super()._get_per_token_logps_and_entropies(model, input_ids, *args, batch_size=batch_size, **kwargs)
        self.loss_window.observe(*output[:2])
        return output

    def _compute_loss(self, model, inputs):
        if self.accelerator.sync_gradients:
            self.add_metric("temperature", self.temperature)
        self.inside_optimizer_step = not self.accelerator.sync_gradients
        has_rows = self.loss_window.begin(inputs)
        with self.row_temperatures.at(inputs.get("temperature")):
            return self.loss_window.end(super()._compute_loss(model, inputs) if has_rows else None)

    # --- evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        evaluation = self._evaluation = Evaluation(dataloader, ahead=self.use_vllm and is_text(self))
        key = [self.args.seed, 1, self.num_generation_batches]
        seeded = self.vllm_generation.seeded(key) if self.use_vllm else nullcontext()
        if evaluation.is_waiting:  # its batches are read before the loop, which could not tell the last one
            self.gather_function = self.accelerator.gather
        if not self.is_in_train:  # the best weights, say, are of no step that the engine knows
            self._last_loaded_step = -1
        try:
            with self.live_temperature.at(self.args.eval_temperature or self.args.temperature), seeded:
                output = super().evaluation_loop(evaluation.batches, *args, **kwargs)
        finally:
            self._evaluation = None
        for name, value in evaluation.metrics(self.num_generations_eval).items():
            self._metrics["eval"][name].append(value)
        return output

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        evaluation = self._evaluation
        if evaluation is not None and evaluation.is_waiting:
            all_ids, *_ = self._tokenize_prompts(evaluation.prompts)
            evaluation.add(all_ids, *super()._generate_single_turn(all_ids, None, {}, self.num_generations_eval))
        sampled = evaluation and evaluation.take(prompt_ids)
        return sampled or super()._generate_single_turn(prompt_ids, *args, **kwargs)

    # --- the run, its checkpoints and its card

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self.loss_window = LossWindow(self)  # a run that was interrupted leaves half a one
        checkpoint = choose_checkpoint(self, resume_from_checkpoint)
        if checkpoint is None:
            begin_run(self)
        with saved_if_it_cannot_go_on(self):
            output = super().train(checkpoint, *args, **kwargs)
        self.rollout_log.flush()
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _save_checkpoint(self, model, trial):
        # Before TRL's part, whose last file marks the checkpoint as complete.
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with full_disk_named(folder):
            save_run(self, folder)
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            resume_run(self, checkpoint)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        # The Hub refuses a card that names a local file as its dataset.
        on_hub = dataset_name is not None and not os.path.exists(dataset_name)
        super().create_model_card(model_name, dataset_name if on_hub else None, tags)
        if self.is_world_process_zero():
            describe_run(self)
            complete_model_card(self.args.output_dir)
