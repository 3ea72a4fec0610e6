"""
Train a model with E3, with one of its baselines, or with GRPO alone (`trainer: fast_grpo`): the recipe decides.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/train.py --config recipes/<recipe>.yaml
    e3-trl train --config my_recipe.yaml [--accelerate_config zero3_4gpu]

The second trains in this process, or in those of an accelerate configuration: a file, or one that comes with e3_trl,
by its name. Every field of `E3ScriptArguments`, of the trainer's config (`E3GRPOConfig` or `FastGRPOConfig`) and of
TRL's `ModelConfig` may stand in the recipe, and on the command line, which wins.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import is_bnb_available, is_matplotlib_available
from datasets import Dataset, DatasetDict, load_dataset
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from .. import E3GRPOConfig, FastGRPOConfig
from ..rewards import REWARD_FUNCS, load_reward_func
from ..rewards.reasoning_gym import is_reasoning_gym, load_splits
from ..runs.publishing import check_hub_access, publish
from ..runs.run_folder import FIGURES, PAGE_FILE
from . import mistakes_named, parse_settings, read_config
from .models import check_model


logger = logging.getLogger(__name__)
CONFIGS = {"e3": E3GRPOConfig, "fast_grpo": FastGRPOConfig}
# Settings of earlier versions, and what became of them.
GONE = {
    "rerank_every": "New ranks inside a pass made no difference in the study: leave it out",
    "vllm_request_seeds": "A seed per completion cost up to half of vLLM's speed, and calls are seeded: leave it out",
}


@dataclass
class E3ScriptArguments(ScriptArguments):
    """
    Arguments of `e3-trl train`.

    Args:
        trainer (`str`, *optional*, defaults to `"e3"`):
            `"e3"` = [`E3GRPOTrainer`], `"fast_grpo"` = [`FastGRPOTrainer`], whose recipes have no settings of E3.
        reward_funcs (`list[str]`, *optional*, defaults to `["math_accuracy_reward"]`):
            Reward functions: `math_accuracy_reward` (the last `\\boxed{}` counts, wherever it stands),
            `math_reasoning_accuracy_reward` (only what follows `</think>`), one of TRL's (`accuracy_reward`,
            `reasoning_accuracy_reward`, `think_format_reward`), or a dotted path such as
            `my_package.rewards.my_reward`, looked up from the current folder too. The first is the correctness signal
            unless `difficulty_reward_func` names another.
        dataset_config (`str` or a mapping, *optional*):
            Configuration of a dataset on the Hub. Of `dataset_name: reasoning_gym:<task>` a mapping, or JSON: the
            arguments of [`~e3_trl.reasoning_gym_dataset`].
    """

    trainer: str = field(
        default="e3",
        metadata={
            "help": "'e3' = E3GRPOTrainer, 'fast_grpo' = FastGRPOTrainer, without E3.",
            "choices": list(CONFIGS),
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_accuracy_reward"],
        metadata={"help": f"Reward functions: any of {sorted(REWARD_FUNCS)}, or a dotted path."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a dataset on the Hub; of reasoning_gym, a mapping, as JSON here."},
    )


def load_data(script_args: E3ScriptArguments) -> Dataset | DatasetDict:
    """The dataset on the Hub, in a local folder or parquet, JSON or JSON-lines file, or made by reasoning-gym."""
    if script_args.dataset_name is None:
        raise ValueError("dataset_name is not set. Name a dataset on the Hub, or a local folder or file.")
    if is_reasoning_gym(script_args.dataset_name):
        if script_args.dataset_streaming:
            raise ValueError("dataset_streaming is True, and reasoning_gym's problems are no stream. Leave it out.")
        return load_splits(script_args.dataset_name, script_args.dataset_config, ["train", "test"])
    path = Path(script_args.dataset_name)
    files = {file.stem: str(file) for file in sorted(path.glob("*.parquet"))}
    if script_args.dataset_train_split in files:
        # What `e3-trl prepare-data` writes. Loaded as a folder, its card makes datasets cache it by name, for ever.
        return load_dataset("parquet", data_files=files, streaming=script_args.dataset_streaming)
    kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(path.suffix)
    if kind is None and path.is_file():
        raise ValueError(f"dataset_name is {script_args.dataset_name!r}. Give a .parquet, .json or .jsonl file.")
    if kind is None:
        return load_dataset(
            script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    if not path.is_file():
        raise ValueError(f"dataset_name is {script_args.dataset_name!r}, and there is no such file. Check the path.")
    return load_dataset(kind, data_files=str(path), streaming=script_args.dataset_streaming)


def make_trainer(script_args: E3ScriptArguments, training_args: FastGRPOConfig, model_args: ModelConfig):
    """The trainer that a recipe describes; `ValueError` if something in it is wrong."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set. Name a model on the Hub, or its folder.")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not is_bnb_available():
        raise ValueError(
            f"load_in_{4 if model_args.load_in_4bit else 8}bit is True, and bitsandbytes is not installed. "
            "`pip install 'e3-trl[quantization]'`."
        )
    if training_args.hub_token is not None:
        # transformers pickles the arguments beside the model, and that file is pushed.
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if training_args.push_to_hub and training_args.process_index == 0:
        check_hub_access(repo_name(training_args), private=training_args.hub_private_repo)
    given = training_args.model_init_kwargs or {}
    check_model(
        model_args.model_name_or_path,
        revision=given.get("revision", model_args.model_revision),
        cache_dir=given.get("cache_dir"),
        token=given.get("token"),
    )
    dataset = load_data(script_args)
    splits = {"dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["dataset_test_split"] = script_args.dataset_test_split
    for name, split in splits.items():
        if split not in dataset:
            raise ValueError(f"{name} is {split!r}, but the dataset has only {list(dataset)}. Set it to one of them.")
    # Which take many seconds where vLLM is installed.
    if script_args.trainer == "e3":
        from ..trainer import E3GRPOTrainer as trainer_class
    else:
        from ..grpo.trainer import FastGRPOTrainer as trainer_class

    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}
    return trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=[load_reward_func(name) for name in script_args.reward_funcs],
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def repo_name(training_args: FastGRPOConfig) -> str:
    """Of the model repository that the run is for."""
    return training_args.hub_model_id or Path(training_args.output_dir).resolve().name


def train(trainer, script_args: E3ScriptArguments) -> None:
    """
    Train, save, draw the figures, write card and page, and push what is to be pushed. After SIGTERM the process
    ends with the status 143 that schedulers expect, once a checkpoint is written.
    """
    from ..runs.termination import TerminationCallback

    training_args, repo_id = trainer.args, repo_name(trainer.args)
    termination = TerminationCallback()
    trainer.add_callback(termination)
    resume = training_args.resume_from_checkpoint
    with mistakes_named(lambda: termination.has_begun):
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if termination.is_terminated:
        end(trainer)
        print(f"SIGTERM: saved checkpoint-{trainer.state.global_step}; resume_from_checkpoint: true goes on with it.")
        sys.exit(128 + signal.SIGTERM)
    trainer.save_state()
    # Not `push_to_hub`, which a plain `save_model` also calls: the figures are to go with the model, in one commit.
    trainer.save_model(training_args.output_dir, _internal_call=True)
    # ZeRO-3 gathers weights ahead: a gather that is under way when its process ends, or that gloo's threads have not
    # let go of, would abort it. So all wait until it is done, and once more while the figures are drawn.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero() and is_matplotlib_available():
        from ..runs.figures import draw_runs

        draw_runs([training_args.output_dir], Path(training_args.output_dir) / FIGURES)
    trainer.accelerator.wait_for_everyone()
    end(trainer)
    # The card links its dataset to the Hub.
    dataset_name = None if is_reasoning_gym(script_args.dataset_name) else script_args.dataset_name
    trainer.create_model_card(repo_id.split("/")[-1], dataset_name=dataset_name)
    if trainer.is_world_process_zero() and is_matplotlib_available():
        write_page_of(trainer)
    if training_args.push_to_hub and trainer.is_world_process_zero():
        publish(training_args.output_dir, repo_id, revision=training_args.hub_revision)


def write_page_of(trainer) -> None:
    """The page of the run, which knows its prompts also where no completions were logged."""
    path, dataset = Path(trainer.args.output_dir) / PAGE_FILE, trainer.train_dataset
    try:
        from ..runs.page import write_page

        prompts = dataset["prompt"] if isinstance(dataset, Dataset) and "prompt" in dataset.column_names else None
        write_page([trainer.args.output_dir], path, prompts)
    except Exception as error:  # the run is over and saved, and nothing is to come between it and the Hub
        logger.warning(f"{path} was not written: {error!r}. All else was; `e3-trl report` writes it.")


def end(trainer) -> None:
    """End what the processes share; first a colocated engine, which would miss it when it ends by itself."""
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    trainer.accelerator.end_training()


def make_parser(trainer: str = "e3") -> TrlParser:
    """The parser of recipes for a trainer, by its name there."""
    return TrlParser(
        (E3ScriptArguments, CONFIGS[trainer], ModelConfig),
        usage="%(prog)s --config RECIPE [--accelerate_config FILE_OR_NAME] [--FIELD VALUE ...]",
        description=f"Train as the YAML file RECIPE says; fields given here win. With an accelerate configuration, a "
        f"file or one of {', '.join(accelerate_configs())}, in the processes that it describes.",
    )


def accelerate_configs() -> dict[str, str]:
    """The accelerate configurations that come with the package, by name."""
    folder = Path(__file__).parent.parent / "accelerate_configs"
    return {path.stem: str(path) for path in sorted(folder.glob("*.yaml"))}


def launch(config: str, arguments: list[str]) -> None:
    """
    Train in the processes of an accelerate configuration: a file, or one that comes with the package. SIGTERM is
    handed on to them, and the exit status is theirs.
    """
    config = accelerate_configs().get(config, config)
    if not Path(config).is_file():
        raise ValueError(f"accelerate_config is {config!r}. Give a file, or one of {', '.join(accelerate_configs())}.")
    command = ["--config_file", config, "-m", "e3_trl.commands.train", *arguments]

    def hand_on(number, frame):  # as the launcher of several processes does, which sets a handler of its own
        for process in psutil.Process().children():
            process.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    try:
        launch_command(launch_command_parser().parse_args(command))
    except subprocess.CalledProcessError as error:  # of one process, which has said why
        sys.exit(error.returncode)
    except ChildFailedError as error:  # of several: a signal alone, as of a lack of memory, is told by nobody else
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else str(error))


def choose_trainer(arguments: list[str] | None) -> str:
    """
    Name of the trainer that a recipe, or the command line, asks for.

    Raises:
        `ValueError`: if there is none of that name, or the recipe has a setting that is gone.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("trainer", *GONE):
        parser.add_argument(f"--{name}")
    recipe, rest = read_config(arguments)
    given = vars(parser.parse_known_args(rest)[0])
    settings = (recipe or {}) | {name: value for name, value in given.items() if value is not None}
    for name in GONE.keys() & settings:
        raise ValueError(f"{name} is {settings[name]}, a setting that is gone. {GONE[name]}.")
    trainer = settings.get("trainer", "e3")
    if trainer not in CONFIGS:
        raise ValueError(f"trainer is {trainer!r}. Set it to one of {list(CONFIGS)}.")
    return trainer


def main(script_args: E3ScriptArguments, training_args: FastGRPOConfig, model_args: ModelConfig) -> None:
    train(make_trainer(script_args, training_args, model_args), script_args)


def run(arguments: list[str] | None = None) -> None:
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--accelerate_config")
    own, rest = launcher.parse_known_args(arguments)
    if own.accelerate_config is not None:
        with mistakes_named():
            launch(own.accelerate_config, rest)
        return
    with mistakes_named():
        name = choose_trainer(rest)
        of_e3 = {field.name: "Set trainer to 'e3', or leave it out." for field in fields(E3GRPOConfig)}
        script_args, *others = parse_settings(make_parser(name), rest, f"trainer {name!r}", of_e3)
        trainer = make_trainer(script_args, *others)
    train(trainer, script_args)


if __name__ == "__main__":
    run()
