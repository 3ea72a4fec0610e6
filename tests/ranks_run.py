"""One rank of a run under `accelerate launch`: `ranks_run.py '{"model_path": ..., "output_dir": ..., ...}'`."""

import json
import os
import signal
import sys
from pathlib import Path

from conftest import build_trainer
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """Writes what this rank knows after each step to a file of its own; dies at `kill_at` if it is the last rank."""

    def __init__(self, trainer, kill_at: int | None):
        self.trainer, self.kill_at = trainer, kill_at

    def on_step_end(self, args, state, control, **kwargs):
        tracker = self.trainer.difficulty_tracker
        row = {
            "step": state.global_step,
            "temperature": self.trainer.temperature,
            "target": self.trainer._temperature_schedule.target_entropy,
            "difficulty": [str(value) for value in tracker.difficulty],
            "rollouts": tracker.num_rollouts.tolist(),
            "rewards": tracker.reward_sum.tolist(),
        }
        with open(Path(args.output_dir) / f"rank{args.process_index}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if state.global_step == self.kill_at and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    resume, kill_at = settings.pop("resume", None), settings.pop("kill_at", None)
    trainer = build_trainer(settings.pop("model_path"), settings.pop("output_dir"), use_cpu=False, **settings)
    Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.add_callback(Recorder(trainer, kill_at))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    trainer.save_model()
