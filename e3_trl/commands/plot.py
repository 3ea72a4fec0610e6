"""
Draw the paper's figures from run folders. Runs that differ in their seed alone are one line, with its spread.

    e3-trl plot outputs/e3 outputs/grpo [--output_dir outputs/figures]
    e3-trl plot --model outputs/e3 --prompts data/e3/validation.parquet

The second draws Figure 2 (Eq. 4 against the exact temperature) on next-token distributions of the model.
"""

import argparse
from pathlib import Path

import numpy as np

from ..runs.figures import draw_formula, draw_runs
from . import mistakes_named


MODEL = "outputs/quickstart-base"
NUM_PROMPTS = 16
NUM_DISTRIBUTIONS = 256


def sample_logits(model_name: str, prompts_file: str, max_new_tokens: int) -> np.ndarray:
    """Logits at tokens that the model samples at temperature 1, of shape (T, V)."""
    # Runs are drawn without a model.
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import apply_chat_template, is_conversational

    from .models import check_model

    set_seed(0)
    check_model(model_name, "--model")
    if not Path(prompts_file).is_file():
        raise ValueError(f"There is no file {prompts_file!r} with prompts. Name one with --prompts.")
    kind = "parquet" if prompts_file.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=prompts_file, split="train").shuffle(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, device_map="auto").eval()
    logits = []
    for row in rows.select(range(min(NUM_PROMPTS, len(rows)))):
        row = {"prompt": row["prompt"]}
        text = apply_chat_template(row, tokenizer)["prompt"] if is_conversational(row) else row["prompt"]
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits += [step[0].float().cpu() for step in output.logits]
    chosen = torch.randperm(len(logits))[:NUM_DISTRIBUTIONS]
    return torch.stack([logits[index] for index in chosen]).numpy()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders, or reports of `e3-trl evaluate`")
    parser.add_argument("--output_dir", default="outputs/figures", help="where to write (outputs/figures)")
    parser.add_argument("--model", help=f"model for the figure of Eq. 4 ({MODEL}, if it is there)")
    parser.add_argument("--prompts", help="parquet or JSON-lines file with a column prompt (<model>/test.jsonl)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of each completion (64)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not (args.runs or args.model):
        parser.error("nothing to draw. Name run folders, or a model with --model.")

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = draw_runs(args.runs, folder) if args.runs else []
    model = args.model or MODEL
    if args.model or Path(MODEL).is_dir():
        logits = sample_logits(model, args.prompts or f"{model}/test.jsonl", args.max_new_tokens)
        written.append(folder / "formula.png")
        draw_formula(logits, written[-1])
    else:
        print(f"No figure of Eq. 4: {MODEL} is not there. Name a model with --model.")
    print("Written: " + " ".join(map(str, written)))


def run(arguments: list[str] | None = None) -> None:
    with mistakes_named():
        main(arguments)
