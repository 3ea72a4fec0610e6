"""Completions of a model, sampled and scored chunk by chunk, for evaluation and for measuring difficulty."""

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..rewards.accuracy import load_reward_func
from ..rewards.columns import REWARD_ARGUMENTS, check_reward_columns
from ..runs.report import write_json


logger = logging.getLogger(__name__)


@dataclass
class SamplingConfig:
    """
    How completions are sampled and scored.

    Args:
        num_samples (`int`, *optional*, defaults to `16`):
            Completions per problem.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. There is no top-k and no top-p.
        max_completion_length (`int`, *optional*, defaults to `6144`):
            Most tokens of a completion.
        apply_chat_template (`bool`, *optional*, defaults to `True`):
            Whether a problem that is plain text is sent as a user's message, through the model's chat template. If
            `False`, as it is. Messages always go through the template.
        reward_func (`str`, *optional*, defaults to `"math_accuracy_reward"`):
            The reward function that tells right from wrong (above 0.5 is right): one of `e3_trl`, or a dotted path,
            looked up from the current folder too. As in training it gets the columns of the data by name, with the
            answer as `solution`: for those of `e3_trl` marked as a formula, for any other as it stands.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights. `"auto"` = the checkpoint's.
        use_vllm (`bool`, *optional*):
            Whether vLLM samples. If `None`, where it is installed; transformers otherwise.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory that vLLM takes.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that vLLM splits the model over.
        chunk_size (`int`, *optional*, defaults to `64`):
            Problems per chunk. A finished chunk is on disk; a kill costs the one at work. vLLM samples a chunk at a
            time, so few large chunks are faster.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions that transformers samples at a time, all of one problem.
    """

    num_samples: int = field(default=16, metadata={"help": "Completions per problem."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, with no top-k and no top-p."})
    max_completion_length: int = field(default=6144, metadata={"help": "Most tokens of a completion."})
    apply_chat_template: bool = field(
        default=True,
        metadata={"help": "Whether a plain problem is sent as a user's message, through the model's chat template."},
    )
    reward_func: str = field(
        default="math_accuracy_reward",
        metadata={"help": "Reward function that tells right from wrong: one of `e3_trl`, or a dotted path."},
    )
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights. 'auto' = the checkpoint's."})
    use_vllm: bool | None = field(
        default=None, metadata={"help": "Whether vLLM samples. If None, where it is installed; else transformers."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of the GPU's memory that vLLM takes."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM splits the model over."})
    chunk_size: int = field(
        default=64, metadata={"help": "Problems per chunk. A finished chunk is on disk; a kill costs the one at work."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Completions that transformers samples at a time, all of one problem."}
    )

    def __post_init__(self):
        for name in ("num_samples", "max_completion_length", "chunk_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Set it to 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, and every sample would be the same. Set it above 0.")
        installed = importlib.util.find_spec("vllm") is not None
        if self.use_vllm and not installed:
            raise ValueError("use_vllm is True, but vLLM is not installed. Install it, or set use_vllm to False.")
        if self.use_vllm is None:
            self.use_vllm = installed


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str | list[dict[str, str]]], apply_chat_template: bool
) -> list[list[int]]:
    """
    Tokens of `prompts`, as a model reads them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        prompts (`list[str | list[dict[str, str]]]`): texts or conversations.
        apply_chat_template (`bool`): whether texts go through the chat template too, as a user's message.

    Raises:
        `ValueError`: if the tokenizer has no chat template and needs one.
    """
    if not apply_chat_template and all(isinstance(prompt, str) for prompt in prompts):
        return tokenizer(prompts)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"apply_chat_template is {apply_chat_template}, and {tokenizer.name_or_path} has no chat template. "
            "Set it to False and give problems as plain text, or add a template to the tokenizer."
        )
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            add_generation_prompt=True,
            return_dict=False,
        )
        for prompt in prompts
    ]


class CompletionSampler:
    """
    Samples completions of a model, and goes on where a killed run stopped. The weights are loaded when they are first
    needed, so not for what is on disk already.

    Args:
        model (`str`): folder, or name on the Hub.
        prompts (`list[str | list[dict[str, str]]]`): texts or conversations.
        config ([`SamplingConfig`]): how to sample.

    Raises:
        `ValueError`: if the model has no chat template and needs one, or no room for an answer to the longest prompt.
    """

    def __init__(self, model: str, prompts: list[str | list[dict[str, str]]], config: SamplingConfig):
        if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
            merged = f"{str(model).rstrip('/')}-merged"
            raise ValueError(
                f"{model} (model_name_or_path) is an adapter without its base. Merge it, and evaluate {merged}:\n"
                'python -c "import sys, peft, transformers as t; model, merged = sys.argv[1:]; '
                "t.AutoTokenizer.from_pretrained(model).save_pretrained(merged); "
                'peft.AutoPeftModelForCausalLM.from_pretrained(model).merge_and_unload().save_pretrained(merged)" '
                f"{shlex.quote(str(model))} {shlex.quote(merged)}"
            )
        self.model, self.config = model, config
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._prompts = tokenize_prompts(self.tokenizer, prompts, config.apply_chat_template)
        longest = max(self._prompts, key=len)
        context = AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
        if len(longest) >= context:
            raise ValueError(
                f"A problem of {len(longest)} tokens leaves no room in the {context} tokens of {model}: "
                f"{self.tokenizer.decode(longest)[:80]!r}... Drop it, or take a model with a longer context."
            )
        self._max_model_length = min(context, len(longest) + config.max_completion_length)

    def sample(self, seed: int, path: str | Path) -> list[dict]:
        """
        Sample `config.num_samples` completions of each prompt, chunk by chunk into the JSON-lines file `path`. What it
        holds already is not sampled again. Completions depend on the prompt and the seed, not on the other prompts.

        Args:
            seed (`int`): seed of the sampling.
            path (`str` or `Path`): file to write. Its settings stand beside it.

        Returns:
            `list[dict]`: per prompt `completions` (texts), `tokens` (their lengths, with the one that ends them) and
            `truncated` (whether each was cut off), of `config.num_samples` each.

        Raises:
            `ValueError`: if `path` holds what was sampled with other settings, from other prompts or another model.
        """
        # Chunk and batch sizes may change in between: that is how one gets out of a lack of memory.
        names = ("num_samples", "temperature", "max_completion_length", "dtype", "use_vllm")
        settings = {"model": self.model, "weights": _fingerprint(_weights(self.model)), "seed": seed}
        settings |= {name: getattr(self.config, name) for name in names} | {"prompts": _fingerprint(self._prompts)}
        return write_in_chunks(
            lambda chunk: self._sample_chunk([self._prompts[row] for row in chunk], seed),
            len(self._prompts),
            Path(path),
            settings,
            self.config.chunk_size,
            f"Sampling {self.model}",
        )

    def _sample_chunk(self, prompts: list[list[int]], seed: int) -> list[dict]:
        # From the prompt, not from its place, so that a benchmark's result does not depend on those beside it.
        seeds = [
            int(np.random.SeedSequence([seed, int(_fingerprint(prompt), 16)]).generate_state(1)[0])
            for prompt in prompts
        ]
        generate = self._vllm if self.config.use_vllm else self._transformers
        rows = []
        for completions in generate(prompts, seeds):
            texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
            ended = [bool(ids) and ids[-1] in self._eos for ids in completions]
            rows.append(
                {
                    "completions": texts,
                    "tokens": [len(ids) for ids in completions],
                    "truncated": [not end for end in ended],
                }
            )
        return rows

    @cached_property
    def _eos(self) -> set[int]:
        """Chat models end with tokens that their generation config names beside the tokenizer's own."""
        try:
            named = GenerationConfig.from_pretrained(self.model).eos_token_id
        except OSError:
            named = None
        named = named if isinstance(named, list) else [named]
        return {token for token in (*named, self.tokenizer.eos_token_id) if token is not None}

    @cached_property
    def _vllm(self) -> Callable[[list[list[int]], list[int]], list[list[list[int]]]]:
        from vllm import LLM, SamplingParams

        llm = LLM(
            self.model,
            dtype=self.config.dtype,
            gpu_memory_utilization=self.config.vllm_gpu_memory_utilization,
            tensor_parallel_size=self.config.vllm_tensor_parallel_size,
            max_model_len=self._max_model_length,
        )

        def generate(prompts, seeds):
            params = [
                # vLLM counts the seed on from copy to copy.
                SamplingParams(
                    n=self.config.num_samples,
                    seed=seed,
                    temperature=self.config.temperature,
                    max_tokens=self.config.max_completion_length,
                    stop_token_ids=sorted(self._eos),
                    detokenize=False,
                )
                for seed in seeds
            ]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]

        return generate

    @cached_property
    def _transformers(self) -> Callable[[list[list[int]], list[int]], list[list[list[int]]]]:
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.config.dtype).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        # In place of the model's own, whose top-p and penalties would fill what is not set.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,
            eos_token_id=sorted(self._eos) or None,
            pad_token_id=self.tokenizer.pad_token_id or min(self._eos, default=0),
        )

        @torch.inference_mode()
        def generate(prompts, seeds):
            # One problem at a time: no padding, and nothing that depends on its neighbours.
            return [self._generate_copies(model, *row) for row in zip(prompts, seeds, strict=True)]

        return generate

    def _generate_copies(self, model, prompt: list[int], seed: int) -> list[list[int]]:
        completions = []
        for first in range(0, self.config.num_samples, self.config.batch_size):
            set_seed((seed + first) % 2**32)
            output = model.generate(
                torch.tensor([prompt], device=model.device),
                num_return_sequences=min(self.config.batch_size, self.config.num_samples - first),
                max_new_tokens=min(self.config.max_completion_length, self._max_model_length - len(prompt)),
            )
            for ids in output[:, len(prompt) :].tolist():
                end = next((index for index, token in enumerate(ids) if token in self._eos), len(ids))
                completions.append(ids[: end + 1])
        return completions


def load_scorer(name: str, columns: list[str]) -> Callable:
    """
    The reward function that scores problems with these columns.

    Raises:
        `ValueError`: if there is none of that name, or it asks for something else.
    """
    function = load_reward_func(name)
    check_reward_columns(function, columns, {"prompts", "completions", "log_metric"})
    return function


def score_completions(
    problems: dict[str, list], rows: list[dict], path: str | Path, config: SamplingConfig
) -> np.ndarray:
    """
    Score what [`CompletionSampler.sample`] returned, chunk by chunk into the JSON-lines file `path`.

    Args:
        problems (`dict[str, list]`):
            Columns of the problems, `prompt` among them, passed on as in training: those that have the name of one of
            TRL's own arguments are not.
        rows (`list[dict]`): their completions.
        path (`str` or `Path`): file to write.
        config ([`SamplingConfig`]): names the reward function, and tells whether completions are messages to it.

    Returns:
        `np.ndarray` of shape `(num_problems, num_samples)`: rewards, NaN = unscorable.
    """
    function = load_scorer(config.reward_func, list(problems))
    passed_on = {name: values for name, values in problems.items() if name not in REWARD_ARGUMENTS | {"completion"}}
    texts_alone = not config.apply_chat_template and all(isinstance(prompt, str) for prompt in problems["prompt"])

    def score(chunk: range) -> list[dict]:
        texts = [text for row in chunk for text in rows[row]["completions"]]
        completions = texts if texts_alone else [[{"role": "assistant", "content": text}] for text in texts]
        columns = {
            name: [values[row] for row in chunk for _ in range(config.num_samples)]
            for name, values in passed_on.items()
        }
        logged = {}
        scores = function(
            prompts=columns.pop("prompt"), completions=completions, log_metric=logged.__setitem__, **columns
        )
        for name, share in logged.items():
            if name.endswith("/unchecked") and share > 0:
                logger.warning(f"{name} is {share:.2%} in problems {chunk[0]} to {chunk[-1]}: these count as wrong.")
        return [
            {"rewards": list(scores[first : first + config.num_samples])}
            for first in range(0, len(scores), config.num_samples)
        ]

    settings = {"reward_func": config.reward_func, "source": _fingerprint(_source(function))}
    settings |= {"completions": _fingerprint(rows), "problems": _fingerprint(problems)}
    label = f"Scoring with {config.reward_func}"
    path = Path(path)
    # Unlike sampling, scoring costs little: with another or a mended reward, or a corrected answer, it begins anew.
    settings_path = path.with_suffix(".settings.json")
    if settings_path.exists() and json.loads(settings_path.read_text()) != settings:
        settings_path.unlink()
    scored = write_in_chunks(score, len(rows), path, settings, config.chunk_size, label)
    return np.array([row["rewards"] for row in scored], dtype=np.float64)


def write_in_chunks(
    function: Callable[[range], list[dict]], num_rows: int, path: Path, settings: dict, chunk_size: int, label: str
) -> list[dict]:
    """
    The rows of `function`, called for the ranges of rows that the JSON-lines file `path` does not hold yet. A finished
    chunk is on disk before the next begins, and half a row that a killed run left is made anew.

    Args:
        function (`Callable`): returns one row for each number in its range.
        num_rows (`int`): number of rows.
        path (`Path`): file to go on with.
        settings (`dict`): what the rows come from. They are kept beside the file, and have to be the same to go on.
        chunk_size (`int`): rows per call.
        label (`str`): of the progress bar.

    Raises:
        `ValueError`: if the file comes from other settings.
    """
    settings_path = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not settings_path.exists():
        path.unlink(missing_ok=True)
        write_json(settings_path, settings)
    kept = json.loads(settings_path.read_text())
    for name, value in settings.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{path} comes from {name} {kept.get(name)!r}, and it is {value!r} now. Delete {settings_path} to "
                "begin anew, or choose another output_dir."
            )
    with open(path, "a+b") as file:
        file.seek(0)
        lines = file.read().split(b"\n")
        rows = [json.loads(line) for line in lines[:-1]]
        file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        progress = tqdm(total=num_rows, initial=len(rows), desc=label, unit="problem", disable=len(rows) == num_rows)
        with progress:
            while len(rows) < num_rows:
                chunk = function(range(len(rows), min(len(rows) + chunk_size, num_rows)))
                file.write("".join(json.dumps(row) + "\n" for row in chunk).encode())
                file.flush()
                os.fsync(file.fileno())
                rows += chunk
                progress.update(len(chunk))
    return rows


def _weights(model: str) -> list:
    """Of a folder, what changes when another model is saved to it."""
    files = sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _source(function: Callable) -> str:
    """Of the function's module, in which what it calls may have been mended; empty where there is none to read."""
    for what in (inspect.getmodule(function), function):
        try:
            return inspect.getsource(what)
        except (OSError, TypeError):  # of a notebook, or written in C
            continue
    return ""


def _fingerprint(content) -> str:
    # What JSON does not know, such as a date in a column, by its text.
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
