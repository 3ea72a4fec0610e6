"""
What does an optimizer step cost? The 1.5B model of the paper's shape with random weights, 64 rows of long-tailed
lengths up to 4,096 tokens: stock TRL, and micro-batches of rows and of tokens.
"""

from types import SimpleNamespace

import torch

from benchmarks.optimizer import SETTINGS, STOCK, choose, make_bench

from .report import Case


def measure(case: Case) -> None:
    args = SimpleNamespace(device=case.device, micro_batch=4, prompt_length=16)
    names = ["rows", "tokens"]
    size = ("tiny", 16, 64) if case.miniature else ("qwen2-1.5b", 64, 4096)
    bench, work = make_bench(*size, args, case.path("runs"), names)
    choose(bench, work, SETTINGS[0])
    gradients, peaks, seconds = {}, {}, {}

    def turn(name: str) -> torch.Tensor:
        """The gradient of a step whose memory is looked at, which takes a profiler's time on a CPU."""
        clock = bench.clocks[name]
        clock.keeps_gradient = True
        peaks[name] = bench.peak_memory(name)
        seconds[name] = clock.optimizer
        gradient, clock.gradient, clock.keeps_gradient = clock.gradient, None, False
        return gradient

    gradients = {name: turn(name) for name in [STOCK, *names]}
    # What rounding alone does: the same rows in other micro-batches of stock's. The first turn warmed it up.
    work.order = 1
    gradients["order"] = turn(STOCK)
    work.order = 0
    expected = gradients.pop(STOCK)
    apart = {
        name: (torch.linalg.norm(g - expected) / torch.linalg.norm(expected)).item() for name, g in gradients.items()
    }
    rounding = 1e-5 if case.miniature else 0.1
    case.add("gradient: stock's from itself, rows in another order", apart["order"], at_most=rounding)
    for name in names:
        case.add(f"gradient: that of {name} from stock's", apart[name], at_most=max(2 * apart["order"], 1e-5))
    for name in names:
        seconds[name] = bench.turn(name)["optimizer"]
    for name in [STOCK, *names]:
        case.add(f"optimizer phase, {name}", seconds[name], "s")
        case.add(f"speed, {name}", work.lengths().sum() / seconds[name], "tokens/s")
        case.add(f"peak of memory, {name}", peaks[name] / 2**30, "GiB")
    for name in names:
        limits = {} if case.miniature else {"at_most": 0.9}
        case.add(f"time of {name} over stock's, of which {work.useful_tokens:.0%} is no padding",
                 seconds[name] / seconds[STOCK], **limits)  # fmt: skip
