"""
Runs that die by SIGKILL, each in a process of its own, which is forked from this one because the imports take long.

A line on stdin says what to train, `{"model_path": ..., "output_dir": ..., "kill_at": 5}`; a line on stdout, as what
the run has ended. What it printed is in `<output_dir>.log`.
"""

import json
import os
import signal
import sys
import traceback

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
    for line in sys.stdin:
        settings = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(f"{settings['output_dir']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                run(**settings)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
