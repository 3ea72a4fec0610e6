"""
Does this package do on your GPU what it says? Under ten minutes on an H100, without a network:

    make gpu-check                                          # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --parts engine optimizer
    python -m benchmarks.gpu --parts learning --model outputs/SmolLM2-135M/ways
    python -m benchmarks.gpu --miniature                    # without a GPU: that it runs, with tiny models

Each part has processes of its own and a limit of time; one that fails, or does not fit the GPU, is named, and the next
one runs. What was measured is written after each. The exit status is 1 if a part failed or a limit is broken.

    engine     vLLM samples from the policy that is trained; speed of its calls
    optimizer  an optimizer step of 1.5B: time, memory, gradients, against stock TRL
    learning   60 steps of GRPO and of E3: held-out pass@k before and after
    step       a whole step of 1.5B with vLLM: where its seconds go, against stock TRL
    memory     the LoRA recipe's peak against `e3-trl memory`
    sharding   ten steps with ZeRO-3 and with FSDP2 against neither
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from e3_trl.runs.report import write_json

from .report import Case, Number, numbers_file


@dataclass
class Part:
    """
    One question to the GPU.

    Args:
        cases (`tuple[str, ...]`): each has a process of its own.
        small (`tuple[str, ...]`): those that a CPU can do.
        gib (`int`): of GPU memory that it takes.
        packages (`tuple[str, ...]`): that it needs beside e3_trl's own.
        module (`str`, *optional*): its `measure` takes a [`Case`]. If `None`, that of the part's name in this folder.
    """

    cases: tuple[str, ...]
    small: tuple[str, ...]
    gib: int
    packages: tuple[str, ...] = ()
    module: str | None = None


PARTS = {
    "engine": Part(
        ("tied, compiled, sleep level 2", "untied, eager, sleep level 1", "the adapter alone"),
        ("no sleep", "the adapter alone"),
        gib=8,
        packages=("vllm",),
    ),
    "optimizer": Part(("all",), ("all",), gib=38),
    "learning": Part(("all",), ("all",), gib=8, packages=("vllm",)),
    "step": Part(("all",), ("all",), gib=38, packages=("vllm",)),
    "memory": Part(("all",), ("all",), gib=21, packages=("vllm", "deepspeed")),
    "sharding": Part(("none", "zero3", "fsdp2"), ("none", "zero3", "fsdp2"), gib=4, packages=("deepspeed",)),
}
# What starts the process of a case, where python alone does not.
LAUNCHERS = {
    name: ["-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "1"]
    + ["--main_process_port", "0"]
    for name, path in {
        "zero3": Path(__file__).parents[2] / "accelerate_configs" / "zero3_cpu.yaml",
        "fsdp2": Path(__file__).with_name("fsdp2.yaml"),
    }.items()
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "KINETO_LOG_LEVEL": "99",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_A_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
SECONDS = 120  # of a part
SLOWER = 5  # is a CPU, where most of the time goes into starting


def cannot_run(part: Part, gib: float | None) -> str | None:
    """Why a part is skipped, or `None`; `gib` is of the GPU, `None` = there is none."""
    missing = [name for name in part.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if gib is not None and gib < part.gib:
        return f"{part.gib} GiB needed, the GPU has {gib:.0f}"
    return None


def end(process: subprocess.Popen) -> None:
    """With all that it has started: an engine, or what a launcher has put into a session of its own."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def run_case(module: str, case: Case, seconds: float, log: Path) -> str | None:
    """Run a case in a process of its own; what went wrong with it, or `None`."""
    command = [sys.executable, *LAUNCHERS.get(case.name, []), "-m"]
    settings = {key: value for key, value in asdict(case).items() if key != "numbers"}
    # With several GPUs, transformers would split its batches over them.
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    environment = os.environ | ENVIRONMENT | (ON_A_CPU if case.miniature else one_gpu)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "benchmarks.gpu.case", module, json.dumps(settings)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            end(process)
    if status == 0:
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    of_error = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    said = (of_error or lines or ["nothing"])[-1]
    return said if of_error else f"exit status {status}, last it said: {said}"


def run_part(name: str, part: Part, args: argparse.Namespace, folder: Path, logs: Path) -> dict:
    """All cases of a part that can be run; its numbers, and what went wrong. What they print is kept in `logs`."""
    start = time.monotonic()
    seconds = args.seconds * (SLOWER if args.miniature else 1)
    numbers, reasons = [], []
    for case_name in part.small if args.miniature else part.cases:
        case = Case(case_name, str(folder), args.miniature, args.model, args.data, args.reward)
        numbers_file(str(folder), case_name).unlink(missing_ok=True)
        log = logs / f"{name}.{case_name.replace(' ', '_')}.log"
        module = part.module or f"benchmarks.gpu.{name}"
        reason = run_case(module, case, seconds - (time.monotonic() - start), log)
        found = numbers_file(str(folder), case_name)
        numbers += json.loads(found.read_text()) if found.exists() else []
        if reason == "stopped":
            reasons.append(f"{case_name}: stopped, its part had {seconds:g} s")
            break
        if reason is not None:
            reasons.append(f"{case_name}: {reason} (all of it: {log})")
    broken = [number for number in (Number(**entry) for entry in numbers) if not number.is_held]
    reasons += [f"{number}, limit: {number.limit}" for number in broken]
    return {
        "status": "failed" if reasons else "passed",
        "seconds": round(time.monotonic() - start, 1),
        "reasons": reasons,
        "numbers": numbers,
    }


def table(results: dict) -> str:
    """What was measured, part by part."""
    lines = [f"{results['gpu']}, {', '.join(f'{name} {number}' for name, number in results['versions'].items())}"]
    for name, part in results["parts"].items():
        lines.append(f"\n{name}: {part['status']} after {part['seconds']:.0f} s")
        for entry in part["numbers"]:
            number = Number(**entry)
            mark = "" if number.is_held else "  <-- BROKEN"
            lines.append(f"  {number.what:72.72} {number.value:10.4g} {number.unit:8} {number.limit}{mark}")
        lines += [f"  {reason}" for reason in part["reasons"]]
    return "\n".join(lines)


def installed(name: str) -> str:
    for package in (name, f"{name}-cpu"):
        try:
            return version(package)
        except ModuleNotFoundError:
            continue
    return "none"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="all if left out")
    parser.add_argument("--miniature", action="store_true", help="tiny models on the CPU: no speed means anything")
    parser.add_argument("--model", help="for learning: a folder with a model")
    parser.add_argument(
        "--data", help="for learning: a folder with train.jsonl and test.jsonl; the model's if left out"
    )
    parser.add_argument(
        "--reward",
        help="for learning: a reward function, as in recipes; with --model reasoning_gym_reward if left out",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a part has; more for a slower GPU")
    parser.add_argument("--folder", help="for models and runs; a temporary one if left out")
    parser.add_argument(
        "--output", default="outputs/gpu_check.json", help="for the results; logs in a folder beside it"
    )
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not (cuda or args.miniature):
        parser.error("no GPU is seen (torch.cuda.is_available()). --miniature runs all parts on the CPU, tiny.")
    gib = None if args.miniature else torch.cuda.get_device_properties(0).total_memory / 2**30
    results = {
        "gpu": "a CPU, in miniature" if args.miniature else torch.cuda.get_device_name(),
        "gib": gib,
        "versions": {
            name: installed(name) for name in ("e3-trl", "torch", "transformers", "trl", "vllm", "deepspeed")
        },
        "parts": {},
    }
    logs = Path(args.output).with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.parts:
            part = PARTS[name]
            reason = cannot_run(part, gib)
            if reason is not None:
                results["parts"][name] = {"status": "skipped", "seconds": 0, "reasons": [reason], "numbers": []}
            else:
                print(f"{name} ...", flush=True)
                results["parts"][name] = run_part(name, part, args, folder, logs)
            write_json(args.output, results)
    print(table(results))
    print(f"\nwritten to {args.output}")
    failed = [name for name, part in results["parts"].items() if part["status"] == "failed"]
    print(f"failed, or beyond a limit: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
