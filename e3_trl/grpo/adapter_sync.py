"""A colocated vLLM that gets a LoRA adapter alone, beside a base that it has loaded once."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from trl.generation import vllm_generation

from .checks import LORA_RANKS


# Of all adapters in this process, because an engine takes a number that it knows for an adapter that it has.
NUMBERS = count(1)
IN_MEMORY = Path("/dev/shm")


@contextmanager
def engine_for_adapter(rank: int) -> Iterator[None]:
    """
    Inside, the engine that TRL starts has room for an adapter of this rank. TRL builds its settings itself, and offers
    no place for others.

    Asleep, the engine keeps its base in the host's memory (level 1). TRL's level 2 throws the weights away, which only
    the full sync brings back.
    """
    start = getattr(vllm_generation, "LLM", None)
    if start is None:  # there is no vLLM, and TRL says where to get it
        yield
        return

    def start_with_room(**settings):
        reserved = next(reserved for reserved in LORA_RANKS if reserved >= rank)
        llm = start(**settings, enable_lora=True, max_lora_rank=reserved, max_loras=1)
        put_to_sleep = llm.sleep
        llm.sleep = lambda level: put_to_sleep(level=1)
        return llm

    vllm_generation.LLM = start_with_room
    try:
        yield
    finally:
        vllm_generation.LLM = start


def send_adapter(model: PeftModel, llm, gathered):
    """
    Give the engine the adapter that is trained, in the place of the one that it has.

    Args:
        model ([`~peft.PeftModel`]): the policy.
        llm (`vllm.LLM`): the engine of this process.
        gathered (`Callable`): given sharded parameters, a context in which they are whole.

    Returns:
        `vllm.lora.request.LoRARequest`: what a call of the engine has to name, to sample with the adapter.
    """
    from vllm.lora.request import LoRARequest

    name = model.active_adapters[0]
    parameters = {key: value for key, value in model.named_parameters() if model.prefix in key}
    with gathered(list(parameters.values())):
        of_adapter = get_peft_model_state_dict(model, parameters, name, save_embedding_layers=False)
        tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in of_adapter.items()}
    number = next(NUMBERS)
    with tempfile.TemporaryDirectory(prefix="e3-trl-adapter-", dir=_folder_with_room(tensors)) as folder:
        model.peft_config[name].save_pretrained(folder)
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        request = LoRARequest(f"policy-{number}", number, folder)
        llm.llm_engine.add_lora(request)  # has read all of it when it returns
    return request


def _folder_with_room(tensors: dict[str, torch.Tensor]) -> Path | None:
    """The folder that is in memory, where it has room, which in a container may be little. `None` = the default."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    has_room = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 2 * needed
    return IN_MEMORY if has_room else None
