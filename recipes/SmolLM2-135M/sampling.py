"""Many completions of each of a few problems on a CPU: a prompt is read once."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, set_seed


BATCH_SIZE = 128


@torch.inference_mode()
def sample(
    folder: Path, problems: list[dict], num_samples: int, temperature: float, max_new_tokens: int
) -> list[tuple[dict, list[str]]]:
    """`num_samples` completions of each problem, sampled from all tokens."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(problem["prompt"], tokenize=False, add_generation_prompt=True)
        for problem in problems
    ]
    texts: list[list[str]] = [[] for _ in problems]
    # Prompts of about one length together, and a problem's samples in several batches where it has many.
    by_length = sorted(range(len(problems)), key=lambda row: len(prompts[row]))
    copies = min(num_samples, BATCH_SIZE)
    at_once = BATCH_SIZE // copies
    for start in tqdm(range(0, len(problems), at_once), desc=f"Sampling {folder}"):
        rows = by_length[start : start + at_once]
        read = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        while len(texts[rows[-1]]) < num_samples:
            # Anew for each batch, for `generate` adds to it.
            cache = DynamicCache(config=model.config)
            if read["input_ids"].size(1) > 1:
                model(
                    input_ids=read["input_ids"][:, :-1],
                    attention_mask=read["attention_mask"][:, :-1],
                    position_ids=(read["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, :-1],
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                cache.batch_repeat_interleave(copies)
            tokens = model.generate(
                **{name: value.repeat_interleave(copies, 0) for name, value in read.items()},
                past_key_values=cache,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
            )
            new = tokenizer.batch_decode(tokens[:, read["input_ids"].size(1) :], skip_special_tokens=True)
            for place, row in enumerate(rows):
                texts[row] += new[place * copies : (place + 1) * copies]
    return [(problem, of_one[:num_samples]) for problem, of_one in zip(problems, texts, strict=True)]
