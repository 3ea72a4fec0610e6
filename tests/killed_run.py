"""Train in a process of its own and die by SIGKILL: `python killed_run.py '{"model_path": ..., "kill_at": 5}'`."""

import json
import os
import signal
import sys

from conftest import build_trainer
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def __init__(self, step: int, while_saving: bool):
        self.step, self.while_saving = step, while_saving

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.while_saving:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    kill_at, while_saving = settings.pop("kill_at"), settings.pop("while_saving", False)
    trainer = build_trainer(settings.pop("model_path"), settings.pop("output_dir"), **settings)
    trainer.add_callback(Kill(kill_at, while_saving))
    if while_saving:
        save = trainer._save_rng_state

        def die(output_dir):
            if trainer.state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            save(output_dir)

        trainer._save_rng_state = die
    trainer.train()
