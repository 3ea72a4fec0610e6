"""[`E3GRPOTrainer`]: GRPO with dynamic rollout budgets and a temperature schedule."""

import inspect
import os
import textwrap
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from types import CellType

import numpy as np
import requests
import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel, gather_object
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from .callbacks import EngineCheckCallback, TemperatureCallback
from .config import E3GRPOConfig
from .evaluation.metrics import validation_metrics
from .method.advantages import aggregate_advantages
from .method.difficulty import DifficultyTracker
from .method.dynamic_sampling import DynamicSampling
from .method.length_bias import length_bias
from .method.prepo import entropy_weights, prompt_perplexity, select_by_perplexity, token_mean
from .method.temperature import EntropyWindow, TemperatureSchedule
from .rollouts.sampler import RolloutBudgetSampler
from .rollouts.telemetry import RolloutLog, rollout_counts, rollout_metrics
from .rollouts.vllm import RolloutGeneration, VLLMServerError
from .runs.checkpoint import (
    dataset_fingerprint,
    is_resharded,
    last_complete_checkpoint,
    load_state,
    load_window,
    save_state,
    save_window,
)
from .runs.describe import describe_run
from .runs.publishing import complete_model_card
from .runs.validation import check_run, initial_difficulty


logger = get_logger(__name__)

# Column that carries a row's index in the dataset from the dataset to the advantages; nothing else sees it.
PROMPT_ID = "e3_prompt_id"


class E3GRPOTrainer(GRPOTrainer):
    r"""
    Trainer for E3 (Efficiency and Exploration in RL for LLMs, https://huggingface.co/papers/2505.18573).

    It differs from [`~trl.GRPOTrainer`] in two things, each of which can be switched off: the number of completions
    per prompt follows the prompt's difficulty (`rollout_allocation`), and the temperature follows the policy's entropy
    (`temperature_schedule`). With both off, its losses equal GRPOTrainer's to the last bit. More can be switched on: a
    length bias for easy prompts (`length_bias_coef`), DAPO's dynamic sampling (`dynamic_sampling`), and PREPO's choice
    of prompts by perplexity (`prompt_selection_ratio`) and weighting by entropy (`entropy_weighting`).

    What is overridden, each around a call of `super()`:

    | hook | why |
    |---|---|
    | `__init__` | check the data before a model is loaded, give every prompt an id, find the temperature's places |
    | `train` | begin `rollouts.jsonl`; resume from the last complete checkpoint; save if the vLLM server is lost |
    | `temperature` | a property: setting it reaches sampling, log-probs, entropies and the reference model alike |
    | `_set_signature_columns_if_needed` | keep the prompt's id under `remove_unused_columns` |
    | `_get_train_sampler` | repeat each prompt as often as its budget says (Algorithm 1) |
    | `_generate` | seed vLLM; sample further prompts in place of those whose rewards are all equal (DAPO) |
    | `_calculate_rewards` | keep the gathered rewards and completion lengths |
    | `_generate_and_score_completions` | choose prompts (PREPO); count rewards; advantages for groups of any size |
    | `_get_per_token_logps_and_entropies` | keep the entropies of completions that are being scored (PREPO) |
    | `_compute_loss` | keep the entropy of the micro-batch for the temperature schedule |
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
    from e3_trl import E3GRPOConfig, E3GRPOTrainer
    from trl.rewards import accuracy_reward

    trainer = E3GRPOTrainer(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        reward_funcs=accuracy_reward,
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

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: E3GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = E3GRPOConfig(f"{name.split('/')[-1]}-E3")
        reward_list = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        eval_list = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        fixed_columns = not (kwargs.get("environment_factory") or kwargs.get("rollout_func"))
        check_run(args, reward_list, train_dataset, eval_list, fixed_columns, bool(kwargs.get("tools")))

        # The schedule moves `temperature`; these are TRL's fused LM heads, which read it from a closure.
        self._temperature_cells: list[CellType] = []
        # A stream has no index: no difficulty, and nothing by which it could be told from another.
        self.difficulty_tracker: DifficultyTracker | None = None
        self._dataset: dict = {}
        self._train_sampler: RolloutBudgetSampler | None = None
        self._temperature_schedule: TemperatureSchedule | None = None
        if isinstance(train_dataset, Dataset):
            self.difficulty_tracker = DifficultyTracker(
                len(train_dataset), initial_difficulty(args.difficulty_column, train_dataset)
            )
            self._dataset = {"num_prompts": len(train_dataset), "fingerprint": dataset_fingerprint(train_dataset)}
            train_dataset = train_dataset.add_column(PROMPT_ID, np.arange(len(train_dataset)))
        self.entropy_window = EntropyWindow()
        self._num_generation_batches = 0
        self._inside_optimizer_step = False
        self._scored, self._kept_rows = [], None
        self._scoring_entropies: list[torch.Tensor] | None = None
        self._eval_correctness: list[torch.Tensor] = []
        kwargs["callbacks"] = [
            *(kwargs.get("callbacks") or []),
            EngineCheckCallback(self, [train_dataset, *eval_list]),
        ]

        try:
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        except requests.ConnectionError as error:
            if args.vllm_mode != "server":
                raise
            url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
            raise VLLMServerError(url, model if isinstance(model, str) else model.name_or_path, str(error)) from error

        self._temperature_cells = [
            _temperature_cell(model) for model in (self.model, self.ref_model) if model is not None
        ]
        if self.use_vllm:
            RolloutGeneration.adopt(self.vllm_generation, args.vllm_request_seeds)
        self._difficulty_reward_index = (
            0 if args.difficulty_reward_func is None else self.reward_func_names.index(args.difficulty_reward_func)
        )
        self._rollout_log = RolloutLog(args.output_dir)
        if args.temperature_schedule == "entropy":
            schedule = args.make_temperature_schedule(self.model.config.get_text_config().vocab_size)
            self.add_callback(TemperatureCallback(self, schedule))

    @property
    def temperature(self) -> float:
        """Temperature of sampling and of every log-prob and entropy. It may be set between generation batches."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = temperature
        if not self._temperature_cells:
            return  # GRPOTrainer.__init__ is still building what is set below
        for cell in self._temperature_cells:
            cell.cell_contents = temperature
        if self.use_vllm:
            self.vllm_generation.temperature = temperature
        else:
            self.generation_config.temperature = temperature
            self.generation_kwargs["temperature"] = temperature

    @property
    def window_step(self) -> int:
        """Micro-steps since the last generation batch, 0 = the next one generates."""
        return self._step % (self.args.steps_per_generation * self.num_iterations)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir} (output_dir) holds no complete "
                    "checkpoint. Unset it to start a new run."
                )
        if resume_from_checkpoint:
            deepspeed = self.accelerator.state.deepspeed_plugin
            if is_resharded(resume_from_checkpoint, self.accelerator.num_processes, deepspeed is not None):
                deepspeed.deepspeed_config["checkpoint"] = {"load_universal": True}
        elif self.accelerator.is_main_process:
            self._rollout_log.start()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except VLLMServerError:
            # Between two optimizer steps the run can go on from where it stands, whenever it last saved.
            saved = last_complete_checkpoint(self.args.output_dir) or ""
            self.accelerator.wait_for_everyone()
            is_new = self.state.global_step > 0 and not saved.endswith(f"-{self.state.global_step}")
            if is_new and not self._inside_optimizer_step:
                self._save_checkpoint(self.model, trial=None)
            raise

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if PROMPT_ID not in self._signature_columns:
            self._signature_columns.append(PROMPT_ID)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        self._train_sampler = RolloutBudgetSampler(
            difficulty=self.difficulty_tracker,
            budget_schedule=self.args.make_budget_schedule() if self.args.rollout_allocation == "rank" else None,
            data_source=sampler.data_source,
            num_candidates=self.args.num_candidates if self.args.prompt_selection_ratio < 1 else None,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        return self._train_sampler

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if not self.model.training:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self._eval_correctness.append(rewards_per_func[:, self._difficulty_reward_index])
            return rewards_per_func
        if self.difficulty_tracker is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._kept_rows is not None:  # dynamic sampling had to score them to know which to keep
            return torch.cat([rewards for rewards, _ in self._scored])[self._kept_rows]
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=self.accelerator.device)
        self._scored.append((rewards_per_func, self.accelerator.gather(lengths)))
        return rewards_per_func

    def _generate(self, prompts):
        batch = self._num_generation_batches
        if not self.model.training and self.use_vllm:
            groups = np.arange(len(prompts) * self.accelerator.num_processes) // self.num_generations_eval
            # Rounds that training does not get to.
            evaluation_round = self.args.max_resample_rounds + 1 + len(self._eval_correctness)
            self.vllm_generation.set_seeds(self.args.seed, batch, groups, evaluation_round)
        if not self.model.training or self.difficulty_tracker is None:
            return super()._generate(prompts)
        if self.use_vllm:
            self.vllm_generation.set_seeds(self.args.seed, batch, self._prompt_ids)
        output = super()._generate(prompts)
        if not self.args.dynamic_sampling:
            return output

        sampling = DynamicSampling(self._prompt_ids, len(self.train_dataset), [self.args.seed, batch])
        first = self.accelerator.process_index * len(prompts)
        share = slice(first, first + len(prompts))
        columns, rows = list(self._inputs[0]), []
        while True:
            prompt_ids, completion_ids, _, completions, logprobs, *rest = output
            self._pending_extra_logs.clear()
            rewards = self._calculate_rewards(self._inputs, prompts, completions, completion_ids)
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            sampling.observe(total.masked_fill(rewards.isnan().all(dim=1), torch.nan).cpu().numpy())
            logged = [
                {name: values[row] for name, values in self._pending_extra_logs.items()} for row in range(len(prompts))
            ]
            fields = self._inputs, prompts, prompt_ids, completion_ids, completions, logprobs or prompts, logged
            rows += gather_object(list(zip(*fields, strict=True)))
            if sampling.is_full or len(sampling.prompt_ids) > self.args.max_resample_rounds:
                break
            drawn = sampling.draw()
            if drawn is None:
                break
            if self.use_vllm:
                self.vllm_generation.set_seeds(self.args.seed, batch, drawn, len(sampling.prompt_ids) - 1)
            self._inputs[:] = self._examples(drawn[share], columns)
            prompts[:] = [example["prompt"] for example in self._inputs]
            output = super()._generate(prompts)

        self._sampled_ids, self._kept_rows = np.concatenate(sampling.prompt_ids), sampling.rows
        kept = zip(*(rows[row] for row in sampling.rows[share]), strict=True)
        # TRL goes on with its own lists of inputs and prompts, which become those of the groups kept.
        self._inputs[:], prompts[:], prompt_ids, completion_ids, completions, kept_logprobs, logged = map(list, kept)
        for name in sorted({name for row in rows for name in row[-1]}):  # on all ranks the same
            self._pending_extra_logs[name] = [row.get(name) for row in logged]
        return prompt_ids, completion_ids, None, completions, kept_logprobs if logprobs else None, *rest

    def _generate_and_score_completions(self, inputs):
        if not self.model.training or self.difficulty_tracker is None:
            return super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        first = self.accelerator.process_index * len(inputs)
        share = slice(first, first + len(inputs))
        prompt_ids = self.accelerator.gather(torch.tensor([example[PROMPT_ID] for example in inputs], device=device))
        self._prompt_ids = prompt_ids.cpu().numpy()
        columns = [name for name in inputs[0] if name != PROMPT_ID]
        if self.args.prompt_selection_ratio < 1:
            self._prompt_ids = self._select_prompts(self._prompt_ids)
            inputs = self._examples(self._prompt_ids[share], columns)
        self._sampled_ids = self._prompt_ids
        self._inputs = [{name: example[name] for name in columns} for example in inputs]
        self._scored, self._kept_rows = [], None
        self._scoring_entropies = []
        output = super()._generate_and_score_completions(self._inputs)

        # Whatever was sampled counts towards difficulty, whether it is trained on or not.
        rewards_per_func, lengths = map(torch.cat, zip(*self._scored, strict=True))
        correctness = rewards_per_func[:, self._difficulty_reward_index].cpu().numpy()
        counts = rollout_counts(self._sampled_ids, correctness, lengths.cpu().numpy())
        metrics = self._metrics["train"]
        for name, value in rollout_metrics(counts).items():
            metrics[name].append(value)
        difficulty = self.difficulty_tracker.difficulty
        if self.accelerator.is_main_process:
            step = self.state.global_step + 1
            self._rollout_log.append(step, counts, difficulty[counts["prompt_id"]], self.temperature)
        if self.args.dynamic_sampling:
            metrics["rollouts/sampled"].append(float(len(self._sampled_ids)))
            metrics["rollouts/discarded"].append(float(len(self._sampled_ids) - len(prompt_ids)))
        self.difficulty_tracker.observe(self._sampled_ids, correctness)
        self._num_generation_batches += 1

        # TRL compares rows of `num_generations`; a group here has its prompt's own number of completions.
        kept = slice(None) if self._kept_rows is None else self._kept_rows
        # Groups keep the places, and so the ids, of the first round's.
        rewards_per_func, groups = rewards_per_func[kept].clone(), torch.as_tensor(self._prompt_ids, device=device)
        if self.args.length_bias_coef > 0:
            correct = torch.as_tensor(correctness[kept] > 0.5, device=device)
            rewards_per_func[:, self._difficulty_reward_index] -= length_bias(
                correct,
                lengths[kept],
                groups,
                torch.as_tensor(difficulty[self._sampled_ids[kept]], device=device),
                self.args.length_bias_coef,
                self.args.length_bias_fraction,
            )
        advantages, std = aggregate_advantages(
            rewards_per_func,
            self.reward_weights,
            groups,
            self.scale_rewards,
            self.multi_objective_aggregation,
        )
        if self.args.entropy_weighting:
            weights = entropy_weights(self.accelerator.gather(self._completion_entropy(output)))
            metrics["entropy_weight/max"].append(weights.max().item())
            advantages = advantages * weights
        self._scoring_entropies = None
        output["advantages"] = advantages[share]
        self._logs["advantages"].extend(advantages.tolist())
        metrics["frac_reward_zero_std"][-1] = torch.isclose(std, torch.zeros_like(std)).float().mean().item()
        return output

    def _examples(self, prompt_ids: np.ndarray, columns: list[str]) -> list[dict]:
        """The dataset's rows for these prompts. A row is a dict of its own, which TRL may write to."""
        examples = [self.train_dataset[int(index)] for index in prompt_ids]
        return [{name: example[name] for name in columns} for example in examples]

    def _select_prompts(self, candidate_rows: np.ndarray) -> np.ndarray:
        """The rows of the prompts that PREPO chooses, shape `(N,)`, from rows of all candidates, the same shape."""
        candidates = candidate_rows[np.flatnonzero(np.r_[True, candidate_rows[1:] != candidate_rows[:-1]])]
        per_process = -(-len(candidates) // self.accelerator.num_processes)
        share = np.resize(candidates, (self.accelerator.num_processes, per_process))[self.accelerator.process_index]
        perplexity = self.accelerator.gather(self._prompt_perplexity(self._examples(share, ["prompt"])))
        perplexity = perplexity[: len(candidates)].float().cpu().numpy()
        num_selected = len(candidate_rows) // self.num_generations
        selected = select_by_perplexity(perplexity, num_selected, self.state.global_step / self.state.max_steps)
        self._metrics["train"]["prompt_perplexity/candidates"].append(float(perplexity.mean()))
        self._metrics["train"]["prompt_perplexity/selected"].append(float(perplexity[selected].mean()))
        return self._train_sampler.rows(candidates[selected])

    def _prompt_perplexity(self, examples: list[dict]) -> torch.Tensor:
        """Of each prompt's tokens after the first, at temperature 1; shape `(len(examples),)`."""
        prompt_ids, *_ = self._tokenize_prompts([example["prompt"] for example in examples])
        tokens = [torch.tensor(ids, device=self.accelerator.device) for ids in prompt_ids]
        input_ids = pad(tokens, self._tokenizer.pad_token_id)
        mask = pad([torch.ones_like(ids) for ids in tokens])
        with self._at_temperature(1.0):
            logps = self._score(input_ids, mask, input_ids.size(1) - 1)
        return prompt_perplexity(logps, mask[:, 1:])

    def _completion_entropy(self, output: dict) -> torch.Tensor:
        """Mean entropy of each completion's tokens in this process, NaN without any; shape `(len(inputs),)`."""
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        if "old_per_token_logps" not in output:  # TRL had no use for a forward pass of the policy
            self._scoring_entropies.clear()
            tokens, attended = (
                torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
            )
            self._score(tokens, attended, mask.size(1))
        return token_mean(self._scoring_entropies[0], mask)

    @torch.no_grad()
    def _score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """Log-probs of the last `logits_to_keep` tokens under the policy, without gradient."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, logits_to_keep, self.args.per_device_train_batch_size
            )[0]

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        # TRL's first pass while it scores completions is the policy's, if it makes one (with LoRA, perhaps the
        # reference's: then no log-probs are in its output).
        keep = self.args.entropy_weighting and self._scoring_entropies == [] and model is self.model
        compute_entropy = compute_entropy or keep
        output = super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)
        if keep:
            self._scoring_entropies.append(output[1])
        return output

    @contextmanager
    def _at_temperature(self, temperature: float):
        scheduled, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = scheduled

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        self._inside_optimizer_step = not self.accelerator.sync_gradients
        if self.accelerator.sync_gradients:
            metrics["temperature"].append(self.temperature)
        if self.model.training and self._temperature_schedule is not None:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            num_tokens = self.accelerator.reduce(mask.sum(), reduction="sum").item()
            self.entropy_window.add(metrics["entropy"][-1], num_tokens)
        return loss

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_correctness.clear()
        with self._at_temperature(self.args.eval_temperature or self.args.temperature):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self._eval_correctness:
            samples = torch.cat(self._eval_correctness).view(-1, self.num_generations_eval).cpu().numpy()
            if isinstance(dataloader.dataset, Dataset):
                samples = samples[: len(dataloader.dataset)]  # the last batch is filled up with the first prompts
            for name, value in validation_metrics(samples).items():
                self._metrics["eval"][name].append(value)
        return output

    def _save_checkpoint(self, model, trial):
        # Before TRL's part, whose last file marks the checkpoint as complete.
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.window_step != 0:
            save_window(folder, self.accelerator.process_index, self._buffered_inputs)
        if self.args.should_save:
            tracker = self.difficulty_tracker
            save_state(folder, self._state_dict(), {} if tracker is None else tracker.state_dict())
        super()._save_checkpoint(model, trial)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        # The Hub refuses a card that names a local file as its dataset.
        on_hub = dataset_name is not None and not os.path.exists(dataset_name)
        super().create_model_card(model_name, dataset_name if on_hub else None, tags)
        if self.is_world_process_zero():
            origin = {
                "model_name_or_path": self.model.config._name_or_path,
                "reward_funcs": ", ".join(self.reward_func_names),
                **self._dataset,
            }
            describe_run(self.args.output_dir, self.args, self.state, origin)
            complete_model_card(self.args.output_dir)

    def _state_dict(self) -> dict:
        """What `e3_state.json` holds: all that cannot be recomputed, and what a reader wants to know."""
        sampler, schedule = self._train_sampler, self._temperature_schedule
        return {
            "dataset": self._dataset,
            "num_processes": self.accelerator.num_processes,
            "sampler": None if sampler is None else sampler.state_dict(self._num_generation_batches),
            "num_generation_batches": self._num_generation_batches,
            "window_step": self.window_step,
            "temperature": self.temperature,
            "temperature_schedule": None if schedule is None else schedule.state_dict(),
            "entropy_window": asdict(self.entropy_window),
        }

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            # From its universal format DeepSpeed gives all parameter groups one step counter, and each counts it on.
            for state in self.optimizer.state.values():
                if "step" in state:
                    state["step"] = deepcopy(state["step"])
        if checkpoint is None:
            return
        loaded = load_state(checkpoint, self._dataset)
        if self.accelerator.is_main_process:
            self._rollout_log.resume(self.state.global_step)  # after the checks: what is refused loses no rows
        schedule = self._temperature_schedule
        if loaded is None:
            logger.warning(
                f"{checkpoint} holds no E3 state: difficulty, rollout bounds and temperature start anew from here."
            )
            if schedule is not None:
                schedule.step_count = self.state.global_step
            micro_steps = self.state.global_step * self.args.gradient_accumulation_steps
            self._num_generation_batches = micro_steps // (self.args.steps_per_generation * self.num_iterations)
            return
        state, difficulty = loaded
        if self.difficulty_tracker is not None:
            self.difficulty_tracker.load_state_dict(difficulty)
            self._train_sampler.epoch = state["sampler"]["pass"]
        self.temperature = state["temperature"]
        self._num_generation_batches = state["num_generation_batches"]
        self._step = state["window_step"]
        if self.window_step != 0:
            self._buffered_inputs = load_window(checkpoint, self.accelerator.process_index, self.accelerator.device)
        if schedule is not None and state["temperature_schedule"] is not None:
            schedule.load_state_dict(state["temperature_schedule"])
            self.entropy_window = EntropyWindow(**state["entropy_window"])


def _temperature_cell(model: torch.nn.Module) -> CellType:
    """
    The closure cell from which the fused LM head that TRL put into `model.forward` reads the temperature. It can be
    set at any time, whatever wraps the forward later, where adding another fused head would nest one in the other.
    """
    model = extract_model_from_parallel(model)
    forward = (model.get_base_model() if isinstance(model, PeftModel) else model).forward

    def reads_temperature(function) -> bool:
        return "temperature" in getattr(getattr(function, "__code__", None), "co_freevars", ())

    forward = inspect.unwrap(forward, stop=reads_temperature)
    if not reads_temperature(forward):
        raise RuntimeError(
            f"TRL {trl.__version__} keeps the temperature elsewhere than the TRL that e3_trl was tested with. Install "
            "the version that setup.cfg names."
        )
    return forward.__closure__[forward.__code__.co_freevars.index("temperature")]
