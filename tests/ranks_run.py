"""
One rank of several runs under `accelerate launch`, one after another in the same processes, which take long to start:
`ranks_run.py '[{"model_path": ..., "output_dir": ..., ...}, ...]'`.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import conftest
import numpy as np
import safetensors.torch
from accelerate import PartialState
from conftest import build_trainer, trained_rows
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """Writes what this rank knows after each step to a file of its own; dies at `kill_at` if it is the last rank."""

    def __init__(self, trainer, kill_at: int | None = None):
        self.trainer, self.kill_at = trainer, kill_at

    def on_step_end(self, args, state, control, **kwargs):
        tracker = self.trainer.difficulty_tracker
        row = {
            "step": state.global_step,
            "temperature": self.trainer.temperature,
            "target": self.trainer.temperature_schedule.target_entropy,
            "difficulty": [str(value) for value in tracker.difficulty],
            "rollouts": tracker.num_rollouts.tolist(),
            "rewards": tracker.reward_sum.tolist(),
        }
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(args.output_dir) / f"rank{args.process_index}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        with open(Path(args.output_dir) / f"advantages{args.process_index}.jsonl", "a") as file:
            rows = [
                (ids[mask.bool()].tolist(), advantage)
                for batch in trained_rows(self.trainer._buffered_inputs)  # in another order than sampled
                for ids, mask, advantage in zip(
                    batch["completion_ids"], batch["completion_mask"], batch["advantages"].tolist(), strict=True
                )
            ]
            file.write(json.dumps(rows) + "\n")
        if state.global_step == self.kill_at and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def force_completions(trainer):
    """Give every row a completion that depends on the batch, the round, the row's place in it and its temperature."""

    def generate(prompt_ids, images, multimodal_fields, num_generations, *args):
        first = trainer.accelerator.process_index * len(prompt_ids)
        sampling_round = 0 if trainer._batch is None else len(trainer._batch.rounds)
        of_rows = trainer.row_temperatures.of_rows
        relative = np.ones(len(prompt_ids)) if of_rows is None else of_rows.cpu().numpy() / trainer.temperature
        completions = []
        # Not rounded where a last digit decides.
        for row, thousandths in enumerate(np.floor(1000 * relative + 0.3).astype(int).tolist(), start=first):
            rng = np.random.default_rng([trainer.num_generation_batches, sampling_round, row, thousandths])
            completions.append(rng.integers(2, trainer.model.config.vocab_size, size=rng.integers(1, 9)).tolist())
        return completions, None

    trainer._generate_single_turn = generate


def save_weights(trainer):
    """Write the weights, gathered from all ranks, to `weights.safetensors`, in full precision."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        safetensors.torch.save_file(weights, Path(trainer.args.output_dir) / "weights.safetensors")


def run(resume=None, kill_at=None, forced=False, eval_prompts=None, reward_funcs=(), **settings):
    """Train, evaluate where there is something to evaluate on, and write what the tests compare."""
    if reward_funcs:
        settings["reward_funcs"] = [getattr(conftest, name) for name in reward_funcs]
    if eval_prompts is not None:
        settings["eval_dataset"] = conftest.make_dataset(eval_prompts)
    trainer = build_trainer(settings.pop("model_path"), settings.pop("output_dir"), use_cpu=False, **settings)
    if forced:
        force_completions(trainer)
    trainer.add_callback(Recorder(trainer, kill_at))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    trainer.save_model()
    save_weights(trainer)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        if trainer.accelerator.is_main_process:
            (Path(trainer.args.output_dir) / "eval.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()  # as recipes/train.py does


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        from benchmarks.gpu.sharding import let_accelerate_shard_on_a_cpu

        let_accelerate_shard_on_a_cpu()
    for settings in json.loads(sys.argv[1]):
        folder, rank = Path(settings["output_dir"]), os.environ["RANK"]
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder} begins", file=sys.stderr, flush=True)
        is_refused = settings.pop("is_refused", False)
        try:
            run(**settings)
        except ValueError:
            if not is_refused:
                raise
            # All ranks refuse it, and have trained nothing: the next run may follow.
            (folder / f"refused{rank}.txt").write_text(traceback.format_exc())
        (folder / f"ended{rank}").touch()
    PartialState().destroy_process_group()
    # Everything is written. gloo's threads drop the tensors that DeepSpeed gathered last when they come to it; one
    # that does so while the interpreter ends, on a busy machine, aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
