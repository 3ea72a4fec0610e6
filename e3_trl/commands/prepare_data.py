"""
Make training and validation data from raw problems, with a difficulty for each, as in E3.

    e3-trl prepare-data --config recipes/prepare_data.yaml

Every field of `PreparationArguments` may stand in the configuration, and on the command line, which wins. Duplicates,
the problems of the test sets and prompts that are too long go; a model answers each problem `num_samples` times; of
each source, some are set aside for validation; and of the others that it always (or never) solves, some are kept.
Completions are written to the output folder chunk by chunk: the same command goes on where a killed one stopped.

In the end the folder holds `train.parquet`, `validation.parquet`, their dataset card `README.md`, `report.json`
(settings and counts) and `difficulty.png`. The columns are `prompt`, `solution`, `source`, `accuracy` (share of the
samples that are right) and `difficulty` = 1 - `accuracy`, and those that `reward_func` names. Differs from the paper,
whose data give the share: the trainer's `difficulty_column` takes 1 as the hardest, as k_i in Algorithm 1.

`e3-trl train` takes the folder as its `dataset_name`. With `load_dataset`, name the files: datasets 5.2 caches a
local folder with a card by its name alone, and would go on giving the data of an earlier run.
"""

import inspect
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from datasets import Dataset
from huggingface_hub import DatasetCardData, HfApi, get_token
from huggingface_hub.errors import HTTPError  # of httpx in huggingface_hub 1, of httpx2 in 2
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from trl import TrlParser

from ..evaluation.completions import (
    CompletionSampler,
    SamplingConfig,
    load_scorer,
    score_completions,
    tokenize_prompts,
)
from ..evaluation.problems import answers_for, join_problems, load_problems, normalize_problem, problem_text
from ..runs.report import write_json
from . import mistakes_named


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Of the prepared data, before the accuracy.
COLUMNS = ["prompt", "solution", "source"]
# Of mathematics; Asymptote drawings and long numbers have fewer, down to 1.6.
CHARACTERS_PER_TOKEN = 6000 / 2048


@dataclass
class PreparationArguments(SamplingConfig):
    """
    Arguments of `e3-trl prepare-data`, with those of [`~e3_trl.evaluation.completions.SamplingConfig`].

    Args:
        dataset_name (`list[str]`):
            Parquet, JSON or JSON-lines files, or datasets on the Hub (`owner/name`, or `owner/name:config`), with a
            problem and an answer in each row; or `reasoning_gym:task`.
        dataset_config (`str` or a mapping, *optional*):
            Of `reasoning_gym`, as in training: the train split of that configuration.
        problem_column, answer_column, source_column (`str`, *optional*):
            Their columns. If `None`, found by their usual names; a dataset without a source is one.
        model_name_or_path (`str`, *optional*):
            Model that answers the problems, folder or name on the Hub. It is not needed with `num_correct_column`.
        num_correct_column (`str`, *optional*):
            Column with the number of right answers out of `num_samples`, in place of sampling. (With the share, set
            `num_samples` to 1.)
        num_samples (`int`, *optional*, defaults to `10`):
            Answers per problem.
        max_always_solved (`int`, *optional*, defaults to `2000`):
            Most training problems that are always solved. `None` = all.
        max_never_solved (`int`, *optional*):
            Most training problems that are never solved. `None` = all.
        validation_per_source (`int`, *optional*, defaults to `128`):
            Problems of each source that are set aside for validation, drawn before the two limits above apply: their
            difficulty is that of the source.
        test_sets (`list[str]`, *optional*):
            Files, or datasets on the Hub, whose problems are left out.
        max_prompt_tokens (`int`, *optional*, defaults to `2048`):
            Most tokens of a prompt; longer ones are left out. `None` = no limit.
        tokenizer_name_or_path (`str`, *optional*):
            What counts the tokens: the tokenizer, with its chat template, of the model that is to be trained, which
            need not be `model_name_or_path`. If `None`, 6,000 characters stand for 2,048 tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling, of what is kept and of what is set aside.
        output_dir (`str`, *optional*, defaults to `"data/e3"`):
            Folder to write to.
        hub_dataset_id (`str`, *optional*):
            Dataset on the Hub, `owner/name`, to push to. `None` = it is not pushed.
    """

    dataset_name: list[str] = field(
        default_factory=list, metadata={"help": "Files, or datasets on the Hub, of problems and answers."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Of reasoning_gym, as in training: a mapping, as JSON here."}
    )
    problem_column: str | None = field(default=None, metadata={"help": "Column of the problems."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answers."})
    source_column: str | None = field(default=None, metadata={"help": "Column of the sources."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model that answers the problems."})
    num_correct_column: str | None = field(
        default=None, metadata={"help": "Column of right answers out of `num_samples`, in place of sampling."}
    )
    num_samples: int = field(default=10, metadata={"help": "Answers per problem."})
    max_always_solved: int | None = field(
        default=2000, metadata={"help": "Most training problems that are always solved. None = all."}
    )
    max_never_solved: int | None = field(
        default=None, metadata={"help": "Most training problems that are never solved. None = all."}
    )
    validation_per_source: int = field(
        default=128, metadata={"help": "Problems of each source that are set aside for validation."}
    )
    test_sets: list[str] = field(
        default_factory=list, metadata={"help": "Files, or datasets on the Hub, whose problems are left out."}
    )
    max_prompt_tokens: int | None = field(
        default=2048, metadata={"help": "Most tokens of a prompt; longer ones are left out. None = no limit."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to be trained, whose tokenizer counts. None = 6,000 characters for 2,048 tokens."},
    )
    seed: int = field(default=0, metadata={"help": "Of the sampling, of what is kept and of what is set aside."})
    output_dir: str = field(default="data/e3", metadata={"help": "Folder to write to."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset on the Hub to push to."})

    def __post_init__(self):
        if self.num_correct_column is not None:
            self.use_vllm = False  # nothing is sampled
        super().__post_init__()
        if not self.dataset_name:
            raise ValueError("dataset_name is empty. Name at least one file or dataset.")
        if (self.model_name_or_path is None) == (self.num_correct_column is None):
            raise ValueError(
                f"model_name_or_path is {self.model_name_or_path!r} and num_correct_column is "
                f"{self.num_correct_column!r}. Set one of them: difficulty is either sampled or given."
            )
        for name in ("max_always_solved", "max_never_solved", "validation_per_source"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}. Set it to 0 or more.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens is {self.max_prompt_tokens}. Set it to 1 or more, or to None.")
        if self.hub_dataset_id is not None:
            validate_repo_id(self.hub_dataset_id)
            if get_token() is None:
                raise ValueError(
                    f"hub_dataset_id is {self.hub_dataset_id!r}, and nobody is logged in. Run `hf auth login`, or set "
                    "HF_TOKEN to a token that may write."
                )


def load_raw(args: PreparationArguments) -> pd.DataFrame:
    """The problems of all datasets, with their own columns, and answers as the reward function reads them."""
    columns = {"prompt": args.problem_column, "solution": args.answer_column, "source": args.source_column}
    columns["num_correct"] = args.num_correct_column
    raw = [load_problems(name, "train", columns, args.dataset_config) for name in args.dataset_name]
    for name, frame in zip(args.dataset_name, raw, strict=True):
        if "solution" not in frame:
            raise ValueError(f"{name!r} (dataset_name) has no answers. Set answer_column.")
    problems = join_problems(raw)
    problems["solution"] = answers_for(args.reward_func, problems["solution"])
    return problems


def drop_known(problems: pd.DataFrame, test_prompts: list, counts: dict) -> pd.DataFrame:
    """Without problems that equal an earlier one, or one of the test sets, after normalising."""
    keys = problems["prompt"].map(normalize_problem)
    test = keys.isin({normalize_problem(prompt) for prompt in test_prompts})
    duplicate = keys.duplicated()
    answers = problems.groupby(keys)["solution"].nunique()
    counts |= {
        "rows": len(problems),
        "duplicates": int(duplicate.sum()),
        "problems_with_several_answers": int((answers > 1).sum()),
        "in_test_sets": int((test & ~duplicate).sum()),
    }
    return problems[~duplicate & ~test].reset_index(drop=True)


def drop_long(problems: pd.DataFrame, args: PreparationArguments, counts: dict) -> pd.DataFrame:
    """Without prompts that leave the trained model no room for a whole answer."""
    prompts, limit, unit = problems["prompt"].tolist(), args.max_prompt_tokens, "tokens"
    if limit is None:
        counts["too_long"] = {"limit": None, "dropped": 0}
        return problems
    if args.tokenizer_name_or_path is None:
        limit, unit = int(limit * CHARACTERS_PER_TOKEN), "characters"
        prompts = [problem_text(prompt) for prompt in prompts]
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path)
        prompts = tokenize_prompts(tokenizer, prompts, args.apply_chat_template)
    too_long = np.array([len(prompt) for prompt in prompts]) > limit
    counts["too_long"] = {"limit": f"{limit:,} {unit}", "dropped": int(too_long.sum())}
    return problems[~too_long].reset_index(drop=True)


def balance(
    problems: pd.DataFrame, args: PreparationArguments, rng: np.random.Generator, counts: dict
) -> pd.DataFrame:
    """Training data without the problems always or never solved that are too many."""
    drop = np.zeros(len(problems), dtype=bool)
    for name, accuracy, most in (
        ("always_solved", 1.0, args.max_always_solved),
        ("never_solved", 0.0, args.max_never_solved),
    ):
        rows = np.flatnonzero(problems["accuracy"] == accuracy)
        surplus = 0 if most is None else max(0, len(rows) - most)
        drop[rng.choice(rows, surplus, replace=False)] = True
        counts[name] = {"found": len(rows), "dropped": surplus}
    return problems[~drop].reset_index(drop=True)


def split(problems: pd.DataFrame, per_source: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is left for training, and `per_source` problems of each source for validation."""
    for source, count in problems["source"].value_counts().items():
        if count < per_source:
            raise ValueError(
                f"validation_per_source is {per_source}, and source {source!r} has {count} problems. Lower it."
            )
    validation = problems.groupby("source").sample(per_source, random_state=rng).index
    return problems.drop(validation).reset_index(drop=True), problems.loc[validation].reset_index(drop=True)


def measure_accuracy(problems: pd.DataFrame, args: PreparationArguments) -> np.ndarray:
    """Share of right answers of each problem, NaN = unscorable."""
    folder = Path(args.output_dir) / "sampling"
    sampler = CompletionSampler(args.model_name_or_path, problems["prompt"].tolist(), args)
    rows = sampler.sample(args.seed, folder / "completions.jsonl")
    rewards = score_completions(problems.to_dict("list"), rows, folder / "rewards.jsonl", args)
    return np.where(np.isnan(rewards).any(axis=1), np.nan, (rewards > 0.5).mean(axis=1))


def given_accuracy(num_correct: pd.Series, args: PreparationArguments) -> np.ndarray:
    """Share of right answers of each problem, from their number; with `num_samples` 1 that may be the share."""
    values = pd.to_numeric(num_correct, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~((values >= 0) & (values <= args.num_samples))
    if bad.any():
        raise ValueError(
            f"num_correct_column {args.num_correct_column!r} holds {num_correct[bad].iloc[0]!r}, not a number in "
            f"[0, {args.num_samples}]. Correct it, or set num_samples to the number of answers that it counts."
        )
    broken = values % 1 != 0
    if args.num_samples > 1 and broken.any():
        raise ValueError(
            f"num_correct_column {args.num_correct_column!r} holds {num_correct[broken].iloc[0]!r}, which is no "
            f"number of right answers out of num_samples ({args.num_samples}). If it is their share, set num_samples "
            "to 1."
        )
    return values / args.num_samples


def unscorable(problems: pd.DataFrame, args: PreparationArguments) -> np.ndarray:
    """Whether the reward function gives a problem nothing, whatever is answered, shape `(P,)`."""
    # An answer of nothing, behind the end of a reasoning without which some functions do not look at the gold answer.
    rows = [{"completions": ["</think>"]}] * len(problems)
    path = Path(args.output_dir) / "sampling" / "scorable.jsonl"
    config = replace(args, num_samples=1, chunk_size=1024)
    return np.isnan(score_completions(problems.to_dict("list"), rows, path, config)[:, 0])


def histogram(accuracy: pd.Series, num_samples: int) -> list[int]:
    """Number of problems by right answers out of `num_samples`."""
    return np.bincount(np.rint(accuracy * num_samples).astype(int), minlength=num_samples + 1).tolist()


def print_summary(found: list[int], counts: dict, folder: Path) -> None:
    """How many problems were found and kept, by right answers, and why others were not."""
    print(f"\n{'right':>5} {'found':>6} {'kept':>6}")
    by_correct = [counts[name]["by_correct"] for name in ("train", "validation")]
    width = 60 / max(1, *found)
    for level, (before, *parts) in enumerate(zip(found, *by_correct, strict=True)):
        after = sum(parts)
        bar = "█" * round(after * width) + "░" * round((before - after) * width)
        print(f"{level:>5} {before:>6} {after:>6}  {bar}")
    print(
        f"\n{counts['rows']} rows, {counts['duplicates']} duplicates, {counts['in_test_sets']} in test sets, "
        f"{counts['too_long']['dropped']} too long, {counts['unscorable']} unscorable\n"
        f"{counts['train']['problems']} for training, {counts['validation']['problems']} for validation. Written to "
        f"{folder}, with README.md and figure"
    )


def draw_histogram(found: list[int], counts: dict, path: Path) -> None:
    train, validation = (counts[name]["by_correct"] for name in ("train", "validation"))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    levels = range(len(found))
    axes.bar(levels, found, color="lightgrey", label="left out")
    axes.bar(levels, np.add(train, validation), color="tab:orange", label="validation")
    axes.bar(levels, train, color="tab:blue", label="training")
    axes.set(xlabel=f"right answers out of {len(found) - 1} (0 = hardest)", ylabel="problems")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


CARD = """\
---
{metadata}
---

# Problems with difficulty, for E3

Made by `e3-trl prepare-data`, for [E3](https://huggingface.co/papers/2505.18573), from {names}.

| column | meaning |
|---|---|
| `prompt` | the problem{chat} |
| `solution` | its answer, as the reward function reads it |
| `source` | where it comes from |
| `accuracy` | share of right answers among {num_samples}{by} |
| `difficulty` | 1 - `accuracy`, so 1 = hardest: what the trainer's `difficulty_column: difficulty` expects |

The paper's own data give the share of right answers for difficulty; here that is `accuracy`.

| split | problems | {sources} |
|---|---|{bars}
| train | {train} |
| validation | {validation} |

![Problems by right answers](difficulty.png)

- {duplicates} of {rows} rows were duplicates and {in_test_sets} problems stood in a test set ({test_sets}). They were
  left out.
{dropped}- The validation data were drawn before any problem was left out for its difficulty. No problem is in both.
- Problems were compared without case, white space, punctuation and the LaTeX that changes the looks alone.
- All settings and counts are in [report.json](report.json). The licences of the problems are those of their sources.
"""


def write_card(path: Path, counts: dict, args: PreparationArguments) -> None:
    metadata = DatasetCardData(
        tags=["math", "reinforcement-learning", "e3"],
        task_categories=["text-generation"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}.parquet"} for name in ("train", "validation")],
            }
        ],
    )
    sources = sorted(counts["train"]["by_source"])

    def cells(name: str) -> str:
        numbers = [counts[name]["problems"], *(counts[name]["by_source"].get(source, 0) for source in sources)]
        return " | ".join(map(str, numbers))

    dropped = [
        f"- {counts[name]['dropped']} of {counts[name]['found']} training problems {name.replace('_', ' ')} were left "
        "out.\n"
        for name in ("always_solved", "never_solved")
        if counts[name]["dropped"]
    ]
    if counts["unscorable"]:
        dropped.insert(0, f"- Left out, for no answer can be compared with theirs: {counts['unscorable']}.\n")
    if counts["too_long"]["dropped"]:
        dropped.insert(0, "- Left out as longer than {limit}: {dropped}.\n".format(**counts["too_long"]))
    text = CARD.format(
        metadata=metadata.to_yaml(),
        names=", ".join(f"`{Path(name).name if os.path.exists(name) else name}`" for name in args.dataset_name),
        chat=", as a user's message" if args.apply_chat_template else "",
        num_samples=args.num_samples,
        by=f" of `{args.model_name_or_path}`" if args.model_name_or_path else ", given with the problems",
        sources=" | ".join(sources),
        bars="---|" * len(sources),
        train=cells("train"),
        validation=cells("validation"),
        test_sets=", ".join(f"`{Path(name).name}`" for name in args.test_sets) or "none given",
        dropped="".join(dropped),
        **{name: counts[name] for name in ("rows", "duplicates", "in_test_sets")},
    )
    path.write_text(text)


def write_parquet(frame: pd.DataFrame, path: Path, conversational: bool) -> None:
    """Whole or not at all."""
    if conversational:
        prompts = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in frame["prompt"]
        ]
        frame = frame.assign(prompt=prompts)
    temporary = path.with_name(path.name + ".tmp")
    Dataset.from_pandas(frame, preserve_index=False).to_parquet(temporary)
    os.replace(temporary, path)


def push(folder: Path, name: str) -> None:
    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", exist_ok=True)
        files = ["README.md", "*.parquet", "report.json", "difficulty.png"]
        api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset", allow_patterns=files)
    except (HTTPError, OSError, RuntimeError) as error:  # a failed upload of a large file is a RuntimeError
        raise SystemExit(
            f"hub_dataset_id is {name!r}, and it could not be pushed: {error}\nThe dataset is in {folder}. Log in "
            "with `hf auth login` (a token that may write), and run the same command again."
        ) from error


def main(args: PreparationArguments) -> None:
    raw = load_raw(args)
    test_prompts = [
        prompt for name in args.test_sets for prompt in load_problems(name, config=args.dataset_config)["prompt"]
    ]
    scorer = load_scorer(args.reward_func, list(raw))
    counts: dict = {}
    problems = drop_long(drop_known(raw, test_prompts, counts), args, counts)
    split(problems, args.validation_per_source, np.random.default_rng(0))  # what cannot be split is not sampled either

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.num_correct_column is not None:
        accuracy = given_accuracy(problems["num_correct"], args)
        accuracy[unscorable(problems, args)] = np.nan
    else:
        accuracy = measure_accuracy(problems, args)
    # The columns that training needs: the reward function's own among them.
    asked = [name for name in inspect.signature(scorer).parameters if name in problems and name not in COLUMNS]
    problems = problems[[*COLUMNS, *asked]].assign(accuracy=accuracy, difficulty=1 - accuracy)
    is_unscorable = problems["accuracy"].isna()
    counts["unscorable"] = int(is_unscorable.sum())
    problems = problems[~is_unscorable].reset_index(drop=True)
    found = histogram(problems["accuracy"], args.num_samples)

    rng = np.random.default_rng(args.seed)
    train, validation = split(problems, args.validation_per_source, rng)  # before balancing, as in the paper
    train = balance(train, args, rng, counts)
    conversational = args.apply_chat_template or not all(isinstance(prompt, str) for prompt in problems["prompt"])
    for name, part in {"train": train, "validation": validation}.items():
        write_parquet(part, folder / f"{name}.parquet", conversational)
        levels = histogram(part["accuracy"], args.num_samples)
        counts[name] = {"problems": len(part), "by_source": dict(Counter(part["source"])), "by_correct": levels}
    write_card(folder / "README.md", counts, args)
    draw_histogram(found, counts, folder / "difficulty.png")
    write_json(folder / "report.json", {"settings": asdict(args), "counts": counts})
    print_summary(found, counts, folder)
    if args.hub_dataset_id:
        push(folder, args.hub_dataset_id)


def run(arguments: list[str] | None = None) -> None:
    with mistakes_named():
        main(*TrlParser(PreparationArguments).parse_args_and_config(arguments))
