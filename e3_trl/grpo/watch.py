"""What keeps a run from learning and is plain in its log: said once, with what to change. Nothing is stopped."""

import math
import re
from collections import Counter
from collections.abc import Callable

from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)
# Logs in a row, of those that have the metric, after which it is said.
IN_A_ROW = 10
# A metric (a regular expression), when it is amiss (NaN = it has no value), and what that is and what to do.
Rule = tuple[str, Callable[[float], bool], str]
RULES: list[Rule] = [
    (
        "frac_reward_zero_std",
        lambda value: value >= 1,
        "no group had rewards that differ, so nothing was learned. Look at completions (log_completions: true). If "
        "all are wrong, check reward_funcs, or take easier problems or a better model; if all are right, harder "
        "problems; if it is both, raise num_generations.",
    ),
    (
        "reward",
        math.isnan,
        "no completion had a reward, so nothing was learned: all of reward_funcs returned None. Check them, and the "
        "answers in the dataset.",
    ),
    (
        "rewards/.+/unchecked",
        lambda value: value >= 0.5,
        "the checker gave up on half of the completions or more, which then count as wrong. Look at them "
        "(log_completions: true), and set reward_funcs to one that can read them.",
    ),
    (
        "completions/clipped_ratio",
        lambda value: value >= 0.9,
        "nearly all completions were cut off, most before their answer. Raise max_completion_length.",
    ),
]


class WatchCallback(TrainerCallback):
    """
    Warns of what keeps a run from learning, of each once: in ten logs in a row a metric is amiss. A log without the
    metric, as between generation batches, neither counts nor ends the row. A run that goes on counts anew.

    Attributes:
        rules (`list[Rule]`): what is looked at. A subclass of the trainer may add its own.
        warnings (`list[dict]`): what the run has warned of, `step` and `message` of each.
    """

    def __init__(self):
        self.rules = list(RULES)
        self.warnings: list[dict] = []

    def state_to_save(self) -> dict:
        return {"warnings": [*self.warnings]}

    def restore(self, state: dict | None) -> None:
        self.warnings = [] if state is None else [*state["warnings"]]

    def on_train_begin(self, args, state, control, **kwargs):
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._said: set[tuple[str, str]] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for metric, is_amiss, what in self.rules:
            for name in [name for name in logs or {} if re.fullmatch(metric, name)]:
                value = math.nan if logs[name] is None else logs[name]
                key = name, what
                self._in_a_row[key] = self._in_a_row[key] + 1 if is_amiss(value) else 0
                if self._in_a_row[key] == IN_A_ROW and key not in self._said:
                    self._said.add(key)
                    message = f"For {IN_A_ROW} logs in a row ({name} {value:.3g}) {what}"
                    self.warnings.append({"step": state.global_step, "message": message})
                    logger.warning(message)
