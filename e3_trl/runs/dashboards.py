"""What of a run is no number, in the dashboards that `report_to` names: budgets by difficulty, and the figures."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import is_matplotlib_available
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .run_folder import FIGURES


logger = get_logger(__name__)
DASHBOARDS = ("trackio", "wandb", "tensorboard")
HISTOGRAM = "train/rollouts/by_difficulty"


class DashboardCallback(TrainerCallback):
    """
    Sends to trackio, wandb and TensorBoard what their own callbacks do not: with each log the mean budget of a prompt
    by its difficulty, as a histogram (`train/rollouts/by_difficulty`, flat where every prompt gets as many), and when
    the training ends the figures (`figures/*`), which it draws. What fails is named once, and costs nothing else.

    It has to come before those callbacks: they close their run when the training ends.

    Args:
        trainer ([`E3GRPOTrainer`]): the trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        log = self.trainer.rollout_log
        if state.is_world_process_zero and "loss" in (logs or {}) and log.by_difficulty.any():
            (rollouts, prompts), log.by_difficulty = log.by_difficulty, np.zeros_like(log.by_difficulty)
            with self._named_once("rollouts by difficulty"):
                self._send_budgets(rollouts / np.maximum(prompts, 1), state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        # A run that is terminated has little time, and goes on.
        if state.is_world_process_zero and state.global_step >= state.max_steps and is_matplotlib_available():
            with self._named_once("the figures"):
                self._send_figures(state.global_step)

    @contextmanager
    def _named_once(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the other processes would wait for this one, and the model is not saved yet
            logger.warning_once(f"Could not send {what} to {', '.join(self.trainer.args.report_to)}: {error!r}")

    def _send_budgets(self, budgets: np.ndarray, step: int) -> None:
        edges = np.linspace(0, 1, len(budgets) + 1)
        for backend in self._backends():
            histogram = backend.Histogram(np_histogram=(budgets, edges))
            # trackio counts what comes without a step, such as the metrics that follow.
            of_trackio = {"step": step - 1} if backend.__name__ == "trackio" else {}
            backend.log({HISTOGRAM: histogram, "train/global_step": step}, **of_trackio)
        for writer in self._writers():
            middles = (edges[:-1] + edges[1:]) / 2
            moments = budgets.sum(), budgets @ middles, budgets @ middles**2
            writer.add_histogram_raw(HISTOGRAM, 0, 1, *moments, edges, [0, *budgets], step)

    def _send_figures(self, step: int) -> None:
        from matplotlib.image import imread

        from .figures import draw_runs

        folder = Path(self.trainer.args.output_dir)
        self.trainer.save_state()  # with the log, which is drawn
        figures = {f"figures/{path.stem}": path for path in draw_runs([folder], folder / FIGURES)}
        for backend in self._backends():
            images = {tag: backend.Image(str(path)) for tag, path in figures.items()}
            backend.log({**images, "train/global_step": step})
        for writer in self._writers():
            for tag, path in figures.items():
                writer.add_image(tag, imread(path), step, dataformats="HWC")

    def _backends(self) -> list:
        """trackio and wandb, which have one interface."""
        return [importlib.import_module(name) for name in ("trackio", "wandb") if name in self.trainer.args.report_to]

    def _writers(self) -> list:
        """TensorBoard's."""
        callbacks = self.trainer.callback_handler.callbacks
        return [one.tb_writer for one in callbacks if isinstance(one, TensorBoardCallback) and one.tb_writer]
