"""Temperature schedule: Section 4.2, Eq. 4 and 5 of E3 (https://huggingface.co/papers/2505.18573)."""

import math
import warnings
from dataclasses import dataclass

import numpy as np


class TemperatureSchedule:
    r"""
    Sampling temperature that keeps the policy's entropy at a target.

    After each batch with mean token entropy \\( H_t \\), measured under the current temperature (Eq. 4):

    $$ \tau \leftarrow \tau \left( 1 + \tau \frac{\ln \alpha}{\ln |V| + \ln \ln |V|} \right), \quad
       \alpha = \frac{H_{target}}{H_t} $$

    \\( H_{target} = H_{init} \\), the mean token entropy of the first batch, until
    \\( t_{anneal} = \lfloor 0.6 \, t_{max} \rfloor \\), then (Eq. 5, \\( \eta = 0.9 \\)):

    $$ H_{target} = H_{init} \left( \eta + (1 - \eta) \tfrac{1}{2}
       \left( 1 + \cos \pi \frac{t - t_{anneal}}{t_{max} - t_{anneal}} \right) \right) $$

    Differs from the paper, which is silent on both: the temperature is clamped, and an entropy that is zero, negative
    or not finite leaves it as it is; each warns.

    Args:
        vocab_size (`int`):
            Size of the model's vocabulary \\( |V| \\) (`config.vocab_size`), at least 3.
        temperature (`float`, *optional*, defaults to `1.0`):
            Starting temperature.
        target_entropy (`float`, *optional*):
            \\( H_{init} \\) in nats per token. If `None`, the mean over the first `warmup_steps` batches, during which
            the temperature stays as it is.
        warmup_steps (`int`, *optional*, defaults to `1`):
            Number of batches that \\( H_{init} \\) is measured on.
        max_steps (`int`, *optional*):
            Number of steps of the run \\( t_{max} \\). If `None`, the target is not annealed.
        annealing_start (`float`, *optional*, defaults to `0.6`):
            Fraction of `max_steps` after which the target falls. `None` = never.
        annealing_factor (`float`, *optional*, defaults to `0.9`):
            \\( \eta \\), the part of the target entropy that is left at `max_steps`.
        temperature_min (`float`, *optional*, defaults to `0.1`):
            Lower clamp.
        temperature_max (`float`, *optional*, defaults to `2.0`):
            Upper clamp.
        target_fraction (`float`, *optional*, defaults to `1.0`):
            \\( c \\): the target is \\( c H_{init} \\). Differs from the paper, where it is 1: below, entropy may fall
            part of the way (https://huggingface.co/papers/2510.10959).

    Attributes:
        temperature (`float`): the temperature for the next batch.
        step_count (`int`): \\( t \\), the steps taken so far.
        initial_entropy (`float` or `None`): \\( H_{init} \\), `None` until it is measured.

    Example:

    ```python
    >>> schedule = TemperatureSchedule(vocab_size=151_936)
    >>> schedule.step(0.5)  # the first batch sets the target
    1.0
    >>> round(schedule.step(0.4), 4)  # entropy fell, so the temperature rises
    1.0155

    ```
    """

    def __init__(
        self,
        vocab_size: int,
        temperature: float = 1.0,
        target_entropy: float | None = None,
        warmup_steps: int = 1,
        max_steps: int | None = None,
        annealing_start: float | None = 0.6,
        annealing_factor: float = 0.9,
        temperature_min: float = 0.1,
        temperature_max: float = 2.0,
        target_fraction: float = 1.0,
    ):
        if vocab_size < 3:
            raise ValueError(f"vocab_size is {vocab_size}. Eq. 4 needs ln ln |V| > 0, a vocabulary of 3 or more.")
        if target_entropy is not None and not 0 < target_entropy < math.inf:
            raise ValueError(f"target_entropy is {target_entropy}. Set it above 0 nats, or to None to measure it.")
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps is {warmup_steps}. Set it to 1 or more.")
        if not 0 < target_fraction < math.inf:
            raise ValueError(f"target_fraction is {target_fraction}. Set it above 0, 1 = the first entropy.")
        if annealing_start is not None and not 0 <= annealing_start <= 1:
            raise ValueError(f"annealing_start is {annealing_start}. Set it in [0, 1], or to None for no annealing.")
        if not 0 < annealing_factor <= 1:
            raise ValueError(f"annealing_factor is {annealing_factor}. Set it in (0, 1].")
        if not 0 < temperature_min <= temperature <= temperature_max < math.inf:
            raise ValueError(
                f"temperature is {temperature}, temperature_min {temperature_min} and temperature_max "
                f"{temperature_max}. Set 0 < temperature_min <= temperature <= temperature_max."
            )
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.initial_entropy = target_entropy
        self.warmup_steps = warmup_steps
        self.target_fraction = target_fraction
        self.max_steps = max_steps
        self.annealing_start = annealing_start
        self.annealing_factor = annealing_factor
        self.temperature_min = temperature_min
        self.temperature_max = temperature_max
        self.step_count = 0
        self._warmup_entropies: list[float] = []
        self._start = self.state_dict()

    def reset(self) -> None:
        """Begin again, for a run that begins again."""
        self.load_state_dict(self._start)

    @property
    def target_entropy(self) -> float | None:
        r"""\\( H_{target} \\) of the current step in nats per token (Eq. 5), `None` until it is measured."""
        if self.initial_entropy is None:
            return None
        target = self.target_fraction * self.initial_entropy
        if self.annealing_start is None or self.max_steps is None:
            return target
        annealing_step = math.floor(self.annealing_start * self.max_steps)
        step = min(self.step_count, self.max_steps)
        if step <= annealing_step:
            return target
        progress = (step - annealing_step) / (self.max_steps - annealing_step)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return target * (self.annealing_factor + (1 - self.annealing_factor) * cosine)

    def step(self, entropy: float, num_steps: int = 1) -> float:
        r"""
        Take a batch's entropy and return the temperature for the next batch (Eq. 4).

        Args:
            entropy (`float`):
                Mean token entropy of the batch \\( H_t \\) in nats, under the current temperature.
            num_steps (`int`, *optional*, defaults to `1`):
                Optimizer steps that the batch was trained on, by which \\( t \\) advances.

        Returns:
            `float`: the new temperature.
        """
        self.step_count += num_steps
        if not 0 < entropy < math.inf:
            warnings.warn("Entropy is not a positive finite number: the temperature stays as it is.", stacklevel=2)
            return self.temperature
        if self.initial_entropy is None:
            self._warmup_entropies.append(entropy)
            if len(self._warmup_entropies) == self.warmup_steps:
                self.initial_entropy = sum(self._warmup_entropies) / self.warmup_steps
            return self.temperature

        alpha = self.target_entropy / entropy
        log_vocab = math.log(self.vocab_size)
        temperature = self.temperature * (1 + self.temperature * math.log(alpha) / (log_vocab + math.log(log_vocab)))
        self.temperature = min(max(temperature, self.temperature_min), self.temperature_max)
        if self.temperature != temperature:
            warnings.warn(
                f"Temperature clamped to [{self.temperature_min}, {self.temperature_max}]: entropy is no longer held "
                "at its target.",
                stacklevel=2,
            )
        return self.temperature

    def state_dict(self) -> dict[str, float | int | list[float] | None]:
        """JSON-serializable state from which [`TemperatureSchedule.load_state_dict`] goes on exactly."""
        return {
            "temperature": self.temperature,
            "initial_entropy": self.initial_entropy,
            "step_count": self.step_count,
            "warmup_entropies": list(self._warmup_entropies),
        }

    def load_state_dict(self, state_dict: dict[str, float | int | list[float] | None]) -> None:
        """Restore what [`TemperatureSchedule.state_dict`] returned."""
        self.temperature = state_dict["temperature"]
        self.initial_entropy = state_dict["initial_entropy"]
        self.step_count = state_dict["step_count"]
        self._warmup_entropies = list(state_dict["warmup_entropies"])


def spread_temperatures(
    difficulty: np.ndarray, temperature: float, spread: float, temperature_min: float, temperature_max: float
) -> np.ndarray:
    r"""
    Temperature of each prompt: \\( \tau (1 + s (k - 1/2)) \\), clamped, so that hard prompts are sampled hotter and
    easy ones cooler. Not in E3, whose Limitations ask for it.

    Args:
        difficulty (`np.ndarray`): \\( k \\) in (0, 1], NaN = not known: then \\( \tau \\).
        temperature (`float`): \\( \tau \\).
        spread (`float`): \\( s \\), 0 = \\( \tau \\) for all.
        temperature_min (`float`): lower clamp.
        temperature_max (`float`): upper clamp.

    Returns:
        `np.ndarray` of the shape of `difficulty`.

    Example:

    ```python
    >>> spread_temperatures(np.array([0.1, 0.5, 1.0, np.nan]), 1.2, 0.5, 0.1, 1.4).tolist()
    [0.96, 1.2, 1.4, 1.2]

    ```
    """
    if spread == 0:
        return np.full(difficulty.shape, temperature)
    known = np.where(np.isnan(difficulty), 0.5, difficulty)
    return np.clip(temperature * (1 + spread * (known - 0.5)), temperature_min, temperature_max)


@dataclass
class EntropyWindow:
    """
    Token-weighted mean of the policy's entropy over the micro-batches since the last change of the temperature.

    Attributes:
        entropy_sum (`float`): sum of the token entropies in nats.
        num_tokens (`int`): number of tokens.
        num_steps (`int`): optimizer steps taken.
    """

    entropy_sum: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0

    def add(self, entropy: float, num_tokens: int) -> None:
        """Add a micro-batch with mean token entropy `entropy` over `num_tokens` tokens."""
        self.entropy_sum += entropy * num_tokens
        self.num_tokens += num_tokens

    @property
    def mean(self) -> float:
        """Mean token entropy in nats, 0 without tokens."""
        return self.entropy_sum / max(self.num_tokens, 1)

    def reset(self) -> None:
        """Begin a new window."""
        self.entropy_sum, self.num_tokens, self.num_steps = 0.0, 0, 0


EXACT_TEMPERATURES = 0.01, 100.0


def mean_entropy(logits: np.ndarray, temperature: float) -> float:
    """
    Mean entropy of softmax(logits / temperature).

    Args:
        logits (`np.ndarray` of shape `(T, V)`): one distribution per row.
        temperature (`float`): above 0.

    Returns:
        `float`: in nats per token.
    """
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    weights = np.exp(scaled)
    total = weights.sum(axis=1)
    # -sum p ln p with p = w / sum w; a token that is ruled out (logit -inf) counts nothing.
    weighted = (weights * np.where(weights > 0, scaled, 0.0)).sum(axis=1)
    return float((np.log(total) - weighted / total).mean())


def exact_temperature(logits: np.ndarray, target_entropy: float) -> float:
    """
    The temperature at which the mean entropy of softmax(logits / temperature) is `target_entropy`, which Eq. 4
    approximates. Entropy rises with temperature, so it is found by bisection.

    Args:
        logits (`np.ndarray` of shape `(T, V)`): one distribution per row.
        target_entropy (`float`): in nats per token, above 0 and below ln V.

    Returns:
        `float`, to 1e-6 of itself.

    Raises:
        `ValueError`: if no temperature between 0.01 and 100 reaches the target.
    """
    low, high = EXACT_TEMPERATURES
    if not mean_entropy(logits, low) < target_entropy < mean_entropy(logits, high):
        raise ValueError(
            f"target_entropy is {target_entropy}, and no temperature between {low} and {high} reaches it with these "
            "distributions. Set it between 0 and ln |V|."
        )
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_entropy(logits, middle) < target_entropy else (low, middle)
    return math.sqrt(low * high)
