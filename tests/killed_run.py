"""A run that dies by SIGKILL: `killed_run.py '{"model_path": ..., "output_dir": ..., "kill_at": 5}'`."""

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


def run(model_path, output_dir, kill_at, while_saving=False, **settings):
    trainer = build_trainer(model_path, output_dir, **settings)
    trainer.add_callback(Kill(kill_at, while_saving))
    if while_saving:
        save = trainer._save_rng_state

        def die(output_dir):
            if trainer.state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            save(output_dir)

        trainer._save_rng_state = die
    trainer.train()


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
