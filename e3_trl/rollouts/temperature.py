"""The one temperature of a run, and the places that it has to reach."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import trl
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import GenerationConfig
from trl.generation.vllm_generation import VLLMGeneration


Receiver = Callable[[float], None]


class LiveTemperature:
    """
    Owns the temperature, and hands it to whatever samples or computes log-probs.

    Args:
        value (`float`): the temperature at the start.
    """

    def __init__(self, value: float):
        self.value = value
        self._receivers: list[Receiver] = []

    def send_to(self, receiver: Receiver) -> None:
        """Tell `receiver` the temperature, now and whenever it changes."""
        self._receivers.append(receiver)
        receiver(self.value)

    def set(self, value: float) -> None:
        """Change it everywhere."""
        self.value = value
        for receiver in self._receivers:
            receiver(value)

    @contextmanager
    def at(self, value: float) -> Iterator[None]:
        """Inside, the temperature is `value`."""
        before = self.value
        self.set(value)
        try:
            yield
        finally:
            self.set(before)


def lm_head(model: torch.nn.Module) -> Receiver:
    """
    The fused LM head that TRL has put into `model.forward`, which computes log-probs and entropies.

    It reads the temperature from a closure, whose cell can be set at any time, whatever wraps the forward later.
    Another fused head would be nested in the first.
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
    cell = forward.__closure__[forward.__code__.co_freevars.index("temperature")]

    def receive(temperature: float) -> None:
        cell.cell_contents = temperature

    return receive


def engine(generation: VLLMGeneration) -> Receiver:
    """vLLM, which is told the temperature in each call."""

    def receive(temperature: float) -> None:
        generation.temperature = temperature

    return receive


def transformers_generate(config: GenerationConfig, kwargs: dict) -> Receiver:
    """transformers' `generate`: TRL passes the one or the other."""

    def receive(temperature: float) -> None:
        config.temperature = kwargs["temperature"] = temperature

    return receive


def connect(temperature: LiveTemperature, trainer) -> None:
    """Send the temperature to all places of a [`~trl.GRPOTrainer`] that read it."""
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            temperature.send_to(lm_head(model))
    if trainer.use_vllm:
        temperature.send_to(engine(trainer.vllm_generation))
    else:
        temperature.send_to(transformers_generate(trainer.generation_config, trainer.generation_kwargs))
