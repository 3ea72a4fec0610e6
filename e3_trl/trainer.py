"""[`E3GRPOTrainer`]: GRPO with dynamic rollout budgets and a temperature schedule."""

from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset

from .batch import reuse, steps
from .batch.batch import GenerationBatch, Round
from .batch.prompt_ids import PROMPT_ID, IndexedCollator, IndexedPrompts
from .batch.rollout_func import check_rollouts
from .batch.rounds import OneCall, sampling_of
from .batch.row_sampling import rows_sampled
from .batch.sampler import RolloutBudgetSampler
from .callbacks import TelemetryCallback, TemperatureCallback, clamp_rules
from .checks import check_run, correctness_column, initial_difficulty
from .config import E3GRPOConfig
from .grpo.trainer import FastGRPOTrainer
from .method.budget_rules import load_rule
from .method.difficulty import DifficultyTracker
from .method.temperature import TemperatureSchedule, spread_temperatures
from .paper import PAPER
from .runs.dashboards import DASHBOARDS, DashboardCallback
from .runs.rollout_log import RolloutLog
from .runs.rollout_store import RolloutStore


class E3GRPOTrainer(FastGRPOTrainer):
    r"""
    Trainer for E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573).

    It differs from [`FastGRPOTrainer`] in two things, each of which can be switched off: the number of completions per
    prompt follows the prompt's difficulty (`rollout_allocation`), and the temperature follows the policy's entropy
    (`temperature_schedule`). More can be switched on: a length bias for easy prompts (`length_bias_coef`), DAPO's
    dynamic sampling (`dynamic_sampling`), PREPO's choice of prompts by perplexity (`prompt_selection_ratio`) and
    weighting by entropy (`entropy_weighting`), a temperature by difficulty (`temperature_spread`), and old completions
    that are gone on with (`reuse_rollouts`).

    Where the paper is:

    | paper | code |
    |---|---|
    | Section 4.1, difficulty \\( k_i \\) | [`DifficultyTracker`], told of each batch by `steps.count` |
    | Algorithm 1 | [`~e3_trl.allocate_rollouts`], called by the sampler with each batch's prompts |
    | bounds that widen | [`RolloutBudgetSchedule`] |
    | Eq. 2, groups of any size | [`~e3_trl.group_advantages`], called by `steps.compute_advantages` |
    | Eq. 4 and 5 | [`TemperatureSchedule`], moved by the [`TemperatureCallback`] |

    The way of a generation batch is `_generate_and_score_completions`. Overridden, each around a call of `super()`:

    | hook | why |
    |---|---|
    | `__init__` | check E3's settings before a model is loaded; register what a checkpoint has to hold |
    | `_get_train_sampler` | repeat each prompt as often as its budget says (Algorithm 1) |
    | `_get_dataloader` | give every prompt an id, which the trainer alone sees |
    | `_generate_and_score_completions` | the pipeline of a generation batch; advantages for groups of any size |
    | `_generate` | sample in one call, or in rounds (DAPO, a pilot), each row at its temperature |
    | `_generate_single_turn` | begin with what is left of the completions of the pass before |
    | `_calculate_rewards` | keep the rewards of all processes; score each round once |

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
    _paper = PAPER

    _batch: GenerationBatch | None = None
    _sampling: OneCall | None = None

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
        if not isinstance(args, E3GRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, which has none of E3's settings. Use E3GRPOConfig: it takes the "
                "same arguments, and those of E3."
            )
        reward_list = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        fixed_columns = not (kwargs.get("environment_factory") or kwargs.get("rollout_func"))
        check_run(args, reward_list, train_dataset, fixed_columns, bool(kwargs.get("tools")))

        self.rollout_log = RolloutLog(args.output_dir)
        # A stream, or an environment that makes the prompts, has no index: no difficulty, nothing to recognise it by.
        self.difficulty_tracker: DifficultyTracker | None = None
        if isinstance(train_dataset, Dataset):
            difficulty = initial_difficulty(args.difficulty_column, train_dataset)
            counting = args.success_decay, args.success_prior, args.predicts_solved
            self.difficulty_tracker = DifficultyTracker(len(train_dataset), difficulty, *counting)
        data = train_dataset, eval_dataset, processing_class, reward_processing_classes
        super().__init__(model, reward_funcs, args, *data, [*(callbacks or []), TelemetryCallback(self)], **kwargs)
        self.show_column(PROMPT_ID)
        self.correctness_column = correctness_column(args, self.reward_func_names)
        self.loss_steps.estimates_entropy = args.entropy_estimator == "sampled"
        self.rollout_store = RolloutStore(self.accelerator.is_main_process) if args.reuse_rollouts else None
        tracker, store = self.difficulty_tracker, self.rollout_store
        parts = {"rollout_log": self.rollout_log, "difficulty": tracker, "rollouts": store}
        self.lifecycle.parts |= {name: part for name, part in parts.items() if part is not None}
        if args.temperature_spread > 0:
            self.row_temperatures.attach(self.model, self.ref_model)
        if args.temperature_schedule == "entropy":
            schedule = args.make_temperature_schedule(self.model.config.get_text_config().vocab_size)
            self.add_callback(TemperatureCallback(self, schedule))
            self.watch.rules += clamp_rules(args.temperature_min, args.temperature_max)
        if set(DASHBOARDS) & set(args.report_to):
            self.callback_handler.callbacks.insert(0, DashboardCallback(self))  # it has to come before theirs

    # --- what callbacks, and the steps of a batch, use

    @property
    def temperature_schedule(self) -> TemperatureSchedule | None:
        """What moves the temperature: that of the [`TemperatureCallback`]. `None` = it is constant."""
        callbacks = self.callback_handler.callbacks
        return next((callback.schedule for callback in callbacks if isinstance(callback, TemperatureCallback)), None)

    @property
    def fixed_settings(self) -> dict:
        """What a run cannot change on its way: of the function whose rewards are counted the name, not its place."""
        return super().fixed_settings | {"difficulty_reward_func": self.reward_func_names[self.correctness_column]}

    def difficulty_of(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> np.ndarray:
        """Difficulty that the batch's budgets came from, in (0, 1], NaN = not known; of the shape of `prompt_ids`."""
        return self.difficulty_tracker.difficulty[prompt_ids] if batch.indexed else np.full(len(prompt_ids), np.nan)

    def temperature_of(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> np.ndarray:
        """Temperature of each of the batch's prompts, of the shape of `prompt_ids`."""
        args, difficulty = self.args, self.difficulty_of(batch, prompt_ids)
        return spread_temperatures(
            difficulty, self.temperature, args.temperature_spread, args.temperature_min, args.temperature_max
        )

    def row_temperatures_of(self, batch: GenerationBatch, prompt_ids: np.ndarray) -> torch.Tensor | None:
        """[`E3GRPOTrainer.temperature_of`] the model's rows of these prompts; `None` = they have the trainer's."""
        if self.args.temperature_spread == 0:
            return None
        temperatures = self.temperature_of(batch, prompt_ids)
        return torch.tensor(temperatures, dtype=torch.float32, device=self.accelerator.device)

    # --- a generation batch: choose prompts, give budgets, sample, score, count, shape, compare, weigh

    def _get_train_sampler(self, dataset=None):
        has_budgets = self.args.gives_budgets and self.difficulty_tracker is not None
        self.passes.sampler = RolloutBudgetSampler.like(
            super()._get_train_sampler(dataset),
            difficulty=self.difficulty_tracker,
            budget_schedule=self.args.make_budget_schedule() if has_budgets else None,
            rule=load_rule(self.args.rollout_allocation),
            # Which of them are sampled is not known yet when the dataloader reads them.
            num_candidates=self.args.num_candidates if self.args.prompt_selection_ratio < 1 else None,
        )
        return self.passes.sampler

    def _get_dataloader(self, dataset, *args, is_training=False, **kwargs):
        collator = self.data_collator
        if is_training and self.difficulty_tracker is not None:
            dataset, self.data_collator = IndexedPrompts(dataset), IndexedCollator(collator)
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _generate_and_score_completions(self, inputs):
        if self.evaluation is not None:
            return super()._generate_and_score_completions(inputs)
        with self.new_batch(inputs) as batch:
            steps.choose_prompts(self, batch)  # those that the sampler gave, or some of them (PREPO, DPS)
            output = super()._generate_and_score_completions(batch.examples)
            steps.count(self, batch)  # towards difficulty; rollouts.jsonl, metrics
            steps.store(self, batch)  # for the next pass to begin with
            steps.shape_rewards(self, batch)  # length bias
            steps.compute_advantages(self, batch)  # Eq. 2, groups of any size
            steps.weigh_by_entropy(self, batch, output)  # PREPO
            if self.args.temperature_spread > 0:
                output["temperature"] = self.row_temperatures.of_rows
            output["advantages"] = batch.advantages[batch.share]
            self.replace_logged("advantages", batch.advantages.tolist())
        return output

    @contextmanager
    def new_batch(self, inputs: list[dict]):
        """Inside, these rows are sampled and trained on."""
        index = self.num_generation_batches
        batch = GenerationBatch.begin(index, inputs, self.num_generations, self.accelerator, self.train_dataset)
        of_rounds = {"reward_weights": self.reward_weights, "extra_logs": self.extra_logs}
        column, how = self.correctness_column, (self.sample_round, self.score_round)
        self._batch, self._sampling = batch, sampling_of(self.args, batch, *how, column, **of_rounds)
        try:
            yield batch
        finally:
            self._batch = self._sampling = None
            self.row_temperatures.set(None)

    def _generate(self, prompts):
        if self.evaluation is not None or self._sampling is None:
            return super()._generate(prompts)
        output = self._sampling.generate(prompts)
        trained_ids = self._batch.of_kept(self._batch.sampled_ids)[self._batch.share]
        self.row_temperatures.set(self.row_temperatures_of(self._batch, trained_ids))
        return output

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        sample = super()._generate_single_turn
        if self.evaluation is not None or self._batch is None or self.rollout_store is None:
            return sample(prompt_ids, *args, **kwargs)
        return reuse.generate(self, self._batch, prompt_ids, lambda prompts: sample(prompts, *args, **kwargs))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        steps.log_prompt_ids(self, self._batch, len(prompts))
        if self.evaluation is not None or self._sampling is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._sampling.rewards(prompts, completions, completion_ids_list)

    def sample_round(self, newest: Round, prompts: list) -> tuple:
        """What TRL's `_generate` returns, for a round of the batch."""
        batch, ids = self._batch, newest.prompt_ids
        with rows_sampled(self, batch, ids, batch.share_of(ids)):
            output = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, *_ = output
        if self.rollout_func is not None and batch.indexed and self.args.gives_budgets:
            check_rollouts(self.tokenize(prompts), prompt_ids)
        lengths = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(mask) for mask in tool_mask]
        newest.lengths = self.accelerator.gather(torch.tensor(lengths, device=self.accelerator.device))
        return output

    def score_round(self, newest: Round, prompts: list, completions: list, completion_ids: list) -> torch.Tensor:
        """Rewards of a round's rows of all processes, by function: what is counted and compared."""
        return super()._calculate_rewards(newest.examples, prompts, completions, completion_ids)
