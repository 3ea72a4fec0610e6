"""The one temperature of a run, the places that it has to reach, and how a row differs from it."""

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
        self.value = self.configured = value
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

    def state_to_save(self) -> dict:
        """The temperature, which may have been set by hand, and the one it began with."""
        return {"temperature": self.value, "configured": self.configured}

    def restore(self, state: dict | None) -> None:
        """Go on at the temperature of a checkpoint, unless the run is configured otherwise by now."""
        if state is not None and state["configured"] == self.configured:
            self.set(state["temperature"])


class RowTemperatures:
    """
    Temperatures of rows that do not all have the trainer's. A row's last hidden states are scaled, and with them its
    logits, whoever computes these: the fused LM head divides all rows by the one temperature, as `generate` does.

    Args:
        live ([`LiveTemperature`]): the temperature that the logits are divided by.

    Attributes:
        of_rows (`torch.Tensor` of shape `(B,)`, *optional*):
            Temperatures of the rows that the model computes next, in one forward pass or in parts one after another.
            `None` = the trainer's.
    """

    def __init__(self, live: LiveTemperature):
        self.live = live
        self.set(None)

    def set(self, of_rows: torch.Tensor | None) -> None:
        """The model computes these rows from now on."""
        self.of_rows = of_rows
        self._next = 0

    @contextmanager
    def at(self, of_rows: torch.Tensor | None) -> Iterator[None]:
        """Inside, the model computes these rows."""
        before = self.of_rows, self._next
        self.set(of_rows)
        try:
            yield
        finally:
            self.of_rows, self._next = before

    def attach(self, *models: torch.nn.Module | None) -> None:
        """
        Scale what the models' LM heads get.

        Raises:
            `ValueError`: if the logits of one are not in proportion to its hidden states.
        """
        for model in filter(None, models):
            model = _transformers_model(model)
            softcapping = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            if getattr(model.get_output_embeddings(), "bias", None) is not None or softcapping is not None:
                raise ValueError(
                    f"temperature_spread is above 0, and the LM head of {model.config._name_or_path} has a bias or a "
                    "softcap (final_logit_softcapping). Set temperature_spread to 0."
                )
            model.base_model.register_forward_hook(self._scale)

    def _scale(self, module, args, output):
        if self.of_rows is None:
            return
        hidden = output.last_hidden_state
        of_rows = self.of_rows[self._next : self._next + len(hidden)]
        self._next = (self._next + len(hidden)) % len(self.of_rows)
        scale = self.live.value / of_rows.to(hidden.device)
        output.last_hidden_state = (hidden.float() * scale[:, None, None]).to(hidden.dtype)


def _transformers_model(model: torch.nn.Module) -> torch.nn.Module:
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: torch.nn.Module) -> Receiver:
    """
    The fused LM head that TRL has put into `model.forward`, which computes log-probs and entropies.

    It reads the temperature from a closure, whose cell can be set at any time, whatever wraps the forward later.
    Another fused head would be nested in the first.
    """
    forward = _transformers_model(model).forward

    def reads_temperature(function) -> bool:
        return "temperature" in getattr(getattr(function, "__code__", None), "co_freevars", ())

    forward = inspect.unwrap(forward, stop=reads_temperature)
    if not reads_temperature(forward):
        raise RuntimeError(
            f"TRL {trl.__version__} keeps the temperature elsewhere than the TRL that e3_trl was tested with. Install "
            "trl>=1.15,<1.17; what another version would have to keep stands in e3_trl/grpo/trl_names.py."
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
