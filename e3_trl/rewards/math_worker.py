"""
A process that checks answers with math-verify: `python math_worker.py <socket> <parent pid> <seconds per item>`.

[`~e3_trl.rewards.worker_pool.WorkerPool`] runs this file by its path. A worker thus imports math-verify and nothing of
e3_trl: as a module of `e3_trl.rewards` it would bring torch and TRL, which the rewards there import.
"""

import os
import sys


# Python puts the folder of a file that it runs first on the path, where our modules would hide others of their name.
if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

import json
import logging
import resource
import signal
import threading
import time
from functools import lru_cache
from multiprocessing.connection import Connection

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify


MEMORY_LIMIT = 2**30  # bytes of address space above those of a worker that has just started

# As in trl.rewards.accuracy_reward, which cannot be imported here: it imports torch.
ANSWER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
)


@lru_cache(maxsize=2**14)
def parse_gold(solution: str) -> list:
    return parse(solution, parsing_timeout=None)


def parse_answer(completion: str) -> list:
    return parse(completion, extraction_config=[ANSWER], extraction_mode="first_match", parsing_timeout=None)


def describe(parsed: list) -> str:
    """What was parsed, for the completions table. SymPy may fail to print what it could compare."""
    try:
        return str(parsed)[:500] if parsed else "[unparseable]"
    except Exception:
        return "[unprintable]"


def address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say (macOS)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def die_with(parent: int) -> None:
    """End this process when its parent has ended, also while the main thread is busy."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def check(gold: list, completion: str, with_texts: bool) -> dict:
    answer = parse_answer(completion)
    texts = {"gold_parsed": describe(gold), "answer_parsed": describe(answer)} if with_texts else {}
    return {"reward": float(verify(gold, answer, timeout_seconds=None)), **texts}


def serve(connection: Connection, timeout: float, parse_gold=parse_gold, check=check) -> None:
    """
    Answer requests until the other end closes: by math-verify, or by what is given in its place.

    A request has `solution`, `completion`, `new` and `describe`. If the solution is new, the first answer is
    `{"gold": bool}`, whether it could be parsed. If so, another one has the `reward`, whether the worker should
    `retire`, and the texts `gold_parsed` and `answer_parsed` if `describe`.
    """
    limit = address_space() + MEMORY_LIMIT
    if limit > MEMORY_LIMIT:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def send(**answer) -> None:
        connection.send_bytes(json.dumps(answer).encode())

    send(ready=True)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        # The parent kills a worker that takes too long. If the parent is gone, the kernel does, whatever runs here:
        # one multiplication of large integers can keep the thread of `die_with` waiting for hours.
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)
        gold = parse_gold(request["solution"])
        if request["new"]:
            send(gold=bool(gold))
        if gold:
            signal.setitimer(signal.ITIMER_REAL, timeout + 1)
            verdict = check(gold, request["completion"], request["describe"])
            # A worker that has kept half of its memory would fail at a later answer instead.
            send(retire=address_space() > limit - MEMORY_LIMIT // 2 > 0, **verdict)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    logging.disable()  # math-verify warns that its own time limits are off, and of each answer it cannot parse
    threading.Thread(target=die_with, args=[int(sys.argv[2])], daemon=True).start()
    # The first answer takes longer than later ones, and should not be a user's.
    verify(parse(r"$\frac{1}{3}$", parsing_timeout=None), parse_answer(r"\boxed{0.5}"), timeout_seconds=None)
    serve(Connection(int(sys.argv[1])), timeout=float(sys.argv[3]))
