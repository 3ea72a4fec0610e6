"""A tiny model, tokenizer and task on which a training step takes a few hundredths of a second."""

import atexit
import functools
import gc
import os
import shutil
import signal
import string
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate.utils import imports
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Qwen2Config
from trl import GRPOConfig

from e3_trl import E3GRPOConfig, E3GRPOTrainer, FastGRPOConfig, FastGRPOTrainer
from e3_trl.batch import steps


# On a model this small a second thread costs more than it brings, and on a busy machine a hundred times more.
torch.set_num_threads(1)

# Each training asks accelerate dozens of times what is installed, and each time it would read the packages' metadata.
imports._is_package_available = functools.cache(imports._is_package_available)

# Each training begins with a garbage collection, by accelerate. Among all that was imported that takes half a second,
# several times as long as a tiny model's steps.
gc.freeze()
atexit.register(gc.unfreeze)  # or what ends with the interpreter is called a leak


def pytest_collection_finish():
    """And among all that was collected."""
    gc.collect()
    gc.freeze()


# Those that take longest begin first, so that no process is left alone with one of them at the end.
SLOWEST = ("test_zero3.py", "test_vllm.py", "test_resume.py", "test_quickstart.py", "test_vllm_server.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """TRL tells a colocated vLLM its rank and port through the environment, which later tests hand to subprocesses."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


CHARACTERS = string.ascii_lowercase + string.digits + " :"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"


def vowel_reward(completions, threshold, **kwargs):
    """1 if at least `threshold` of the completion's characters are vowels: prompts differ in difficulty."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(sum(c in "aeiou" for c in text) >= t) for text, t in zip(texts, threshold, strict=True)]


def length_reward(completions, **kwargs):
    """A real-valued reward."""
    return [len(text) / 7 if isinstance(text, str) else len(text[0]["content"]) / 7 for text in completions]


def easy_prompt_reward(completions, threshold, **kwargs):
    """1 for a prompt of threshold 0, whatever the completion."""
    return [float(t == 0) for t in threshold]


def uneven_reward(prompts, completions, **kwargs):
    """Of three of the first four prompts of eight all completions are equally good, and of one of the others."""
    places = [string.ascii_lowercase.index(prompt[4]) % 8 for prompt in prompts]
    return [len(text) / 7 * (place in (2, 4, 5, 7)) for place, text in zip(places, completions, strict=True)]


def sometimes_none_reward(completions, threshold, **kwargs):
    """Cannot score every third completion."""
    rewards = vowel_reward(completions, threshold)
    return [None if index % 3 == 0 else reward for index, reward in enumerate(rewards)]


def reward_of_a_terminated_run(completions, **kwargs):
    """A scheduler's signal comes while it runs, in the third step."""
    if kwargs["trainer_state"].global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]


def reward_that_fails_on_the_last_rank(completions, threshold, **kwargs):
    if kwargs["trainer_state"].global_step == 4 and os.environ["RANK"] == "1":
        raise KeyError("a")
    return vowel_reward(completions, threshold)


def more_for_the_easy(stats, bounds):
    """A user's rule: the minimum for the harder half, and what that leaves for the easier."""
    budgets = np.full(len(stats.success_rate), bounds.num_generations)
    pairs = np.argsort(-np.nan_to_num(stats.success_rate, nan=0.5), kind="stable")
    mean, low, high = bounds
    moved = min(mean - low, high - mean)
    half = len(pairs) // 2
    budgets[pairs[:half]] += moved
    budgets[pairs[len(pairs) - half :]] -= moved
    return budgets


def save_tiny_model(path, config_class=Qwen2Config, tie_word_embeddings: bool = False) -> str:
    """Write a model of 20,000 parameters, a Qwen2 by default, and a character tokenizer to the folder `path`."""
    vocab = {character: index for index, character in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.2,
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def forks():
    """Python in other processes, without the seconds that its imports take."""
    from forked import Forks  # not where this file is imported as a part of `tests`, for its reward functions

    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make_dataset(num_prompts: int = 16) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"say {string.ascii_lowercase[i % 26]}{i}:" for i in range(num_prompts)],
            "threshold": [i % 4 for i in range(num_prompts)],
        }
    )


def make_chat_dataset() -> Dataset:
    """[`make_dataset`] with conversational prompts."""
    plain = make_dataset()
    messages = [[{"role": "user", "content": prompt}] for prompt in plain["prompt"]]
    return Dataset.from_dict({"prompt": messages, "threshold": list(plain["threshold"])})


TRAINER_ARGUMENTS = {
    "model", "reward_funcs", "train_dataset", "eval_dataset", "processing_class", "callbacks", "peft_config",
    "rollout_func", "quantization_config", "environment_factory", "tools",
}  # fmt: skip


def config_of(trainer_class) -> type:
    """The configuration that a trainer takes."""
    configs = {E3GRPOTrainer: E3GRPOConfig, FastGRPOTrainer: FastGRPOConfig}
    return next((config for base, config in configs.items() if issubclass(trainer_class, base)), GRPOConfig)


def build_trainer(model_path, output_dir, trainer_class=E3GRPOTrainer, config_class=None, **overrides):
    """A trainer of 4 prompts x 4 rollouts per update on 16 prompts, so 4 steps a pass. Keywords override."""
    config_class = config_class or config_of(trainer_class)
    arguments = {"model": model_path, "reward_funcs": vowel_reward, "train_dataset": make_dataset()}
    arguments |= {name: overrides.pop(name) for name in list(overrides) if name in TRAINER_ARGUMENTS}
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    if issubclass(config_class, E3GRPOConfig):
        settings |= {"num_generations_min": 2, "num_generations_max": 8}
    trainer = trainer_class(args=config_class(**settings | overrides), **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture
def make_trainer(model_path, tmp_path):
    """[`build_trainer`] on the tiny model, writing to a folder of the test's own."""

    def make(*args, output_dir="run", **overrides):
        return build_trainer(model_path, tmp_path / output_dir, *args, **overrides)

    return make


@contextmanager
def batches_after(step: str):
    """Inside, the generation batches of every training, as the step of this name has left them."""
    batches, do = [], getattr(steps, step)

    def spy(trainer, batch):
        do(trainer, batch)
        batches.append(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, step, spy)
        yield batches


def trained_rows(window: list[dict]) -> list[dict]:
    """All rows of micro-batches, also those that need no gradient, as dicts of tensors of different widths."""
    return [part for batch in window for part in (batch, batch.get("left_out", {})) if "completion_ids" in part]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A Chromium without a window, driven by selenium, that asks the network for nothing of its own."""
    from selenium import webdriver

    programs = [("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)]
    chromium, driver = (next(filter(None, map(shutil.which, names)), None) for names in programs)
    if chromium is None or driver is None:
        pytest.fail(
            "Pages are opened by Chromium. Install it and its driver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for name in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1300,1000",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def logged(trainer, key: str) -> list[float]:
    """The logged values of a metric, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
