"""What of a run is no number, in the dashboards that `report_to` names: rollouts by difficulty, and the figures."""

import importlib
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import is_matplotlib_available
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .publishing import FIGURES


logger = get_logger(__name__)
DASHBOARDS = ("trackio", "wandb", "tensorboard")
HISTOGRAM = "train/rollouts/by_difficulty"


class DashboardCallback(TrainerCallback):
    """
    Sends to trackio, wandb and TensorBoard what their own callbacks do not: with each log the difficulty of the
    rollouts since the last one, as a histogram (`train/rollouts/by_difficulty`, flat where every prompt gets as many),
    and when the training ends the figures (`figures/*`), which it draws.

    It has to come before those callbacks: they close their run when the training ends.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        log = self.trainer.rollout_log
        if not (state.is_world_process_zero and "loss" in (logs or {}) and log.by_difficulty.any()):
            return
        counts, log.by_difficulty = log.by_difficulty, np.zeros_like(log.by_difficulty)
        edges = np.linspace(0, 1, len(counts) + 1)
        for backend in self._backends():
            histogram = backend.Histogram(np_histogram=(counts, edges))
            # The metrics, which follow, have no step: trackio gives them the next one.
            of_trackio = {"step": state.global_step - 1} if backend.__name__ == "trackio" else {}
            backend.log({HISTOGRAM: histogram, "train/global_step": state.global_step}, **of_trackio)
        for writer in self._writers():
            middles = np.repeat((edges[:-1] + edges[1:]) / 2, counts)
            writer.add_histogram(HISTOGRAM, middles, state.global_step, bins=edges)

    def on_train_end(self, args, state, control, **kwargs):
        if not (state.is_world_process_zero and is_matplotlib_available()):
            return
        try:
            self._send_figures(state)
        except Exception as error:  # the model is not saved yet, and no figure is worth more
            logger.warning(f"The figures could not be sent to {', '.join(args.report_to)}: {error!r}")

    def _send_figures(self, state) -> None:
        from matplotlib.image import imread

        from .figures import draw_runs

        folder = Path(self.trainer.args.output_dir)
        self.trainer.save_state()  # with the log, which is drawn
        figures = {f"figures/{path.stem}": path for path in draw_runs([folder], folder / FIGURES)}
        for backend in self._backends():
            images = {tag: backend.Image(str(path)) for tag, path in figures.items()}
            backend.log({**images, "train/global_step": state.global_step})
        for writer in self._writers():
            for tag, path in figures.items():
                writer.add_image(tag, imread(path), state.global_step, dataformats="HWC")

    def _backends(self) -> list:
        """trackio and wandb, which have one interface."""
        return [importlib.import_module(name) for name in ("trackio", "wandb") if name in self.trainer.args.report_to]

    def _writers(self) -> list:
        """TensorBoard's."""
        callbacks = self.trainer.callback_handler.callbacks
        return [one.tb_writer for one in callbacks if isinstance(one, TensorBoardCallback) and one.tb_writer]
