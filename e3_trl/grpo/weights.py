"""What TRL rounds on its way, and a run has to keep: a trained adapter, and the weights of a float32 policy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from .checks import quantized_bits


def trained_adapter(model) -> dict[str, torch.Tensor]:
    """
    Copies of the adapter that a policy with a base in 4 or 8 bits brings along, by parameter name. TRL rounds it to
    bfloat16.
    """
    return {name: parameter.detach().clone() for name, parameter in _of_adapter(model)}


def keep_in_float32(model, brought: dict[str, torch.Tensor]) -> None:
    """
    Have the adapter beside a base in 4 or 8 bits in float32, as PEFT makes it, and does at a resume. In bfloat16 small
    updates of large entries are lost.

    Args:
        model ([`~peft.PeftModel`]): the policy, if it is one; another is left as it is.
        brought (`dict[str, torch.Tensor]`): its [`trained_adapter`], as it was given to the trainer.
    """
    for name, parameter in _of_adapter(model):
        parameter.data = brought.get(name, parameter.data).float()


def _of_adapter(model) -> list[tuple[str, torch.nn.Parameter]]:
    if not (isinstance(model, PeftModel) and quantized_bits(model)):
        return []
    prefix = getattr(model, "prefix", None)  # a prompt that is learned has none, and PEFT leaves it as it is
    return [
        (name, value) for name, value in model.named_parameters() if value.requires_grad and prefix and prefix in name
    ]


@contextmanager
def unrounded(model: torch.nn.Module) -> Iterator[None]:
    """
    Afterwards the model's parameters and buffers are the tensors that they were. For transformers' continuous batching
    TRL casts the whole policy to bfloat16 (`bf16`, its default) or float16, and leaves it so: weights that are trained
    in float32 would be rounded at every generation, and frequencies of rotary embeddings for ever.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
