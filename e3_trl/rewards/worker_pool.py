"""A pool of processes that check answers with math-verify within hard limits."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import NamedTuple


logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("math_worker.py")
MAX_WORKERS = 16  # of about 60 MB each; together they check some thousand answers per second
START_SECONDS = 120  # a file system shared by many nodes can be slow
MAX_FAILED_STARTS = 3


class Verdict(NamedTuple):
    """
    Args:
        reward (`float` or `None`): 1 if the answer is right, 0 if not, `None` if the gold answer cannot be parsed.
        gold_parsed (`str`): what was read from the gold answer.
        answer_parsed (`str`): what was read from the completion.
        checked (`bool`): `False` if time or memory did not suffice, or the worker died: the reward is then 0.
    """

    reward: float | None
    gold_parsed: str = "[unparseable]"
    answer_parsed: str = "[skipped]"
    checked: bool = True


class _Worker:
    """A worker process: the completion that it checks, until when it may, and the gold answers that it has parsed."""

    def __init__(self, timeout: float):
        self.connection, theirs = Pipe()
        with theirs:
            # Not multiprocessing: its "fork" copies a process with CUDA and threads, its "spawn" runs the main script
            # again, with all its imports. In a session of its own a worker does not see the terminal's Ctrl-C.
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(theirs.fileno()), str(os.getpid()), str(timeout)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                # What SymPy finds can depend on the order of a set: the same verdicts in every worker of every run.
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
        self.timeout = timeout
        self.golds: set[str] = set()
        self.ready = False
        self.index: int | None = None
        self.gold: str | None = None  # of the completion that it checks, or has checked last
        self.deadline = time.monotonic() + START_SECONDS

    def start(self, index: int, completion: str, gold: str, describe: bool) -> None:
        request = {"completion": completion, "solution": gold, "new": gold not in self.golds, "describe": describe}
        self.connection.send_bytes(json.dumps(request).encode())
        self.index, self.gold, self.deadline = index, gold, time.monotonic() + self.timeout

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class WorkerPool:
    """
    Checks answers with math-verify in processes that are killed and replaced when they take too long or die.

    Each worker checks one completion at a time in its main thread, and parses a gold answer once; completions with the
    same gold answer go to the worker that knows it, unless another one would be idle. Workers start at the first call
    and stay. They import math-verify only, and end with this process, however it ends. A process forked from this one
    starts its own. Needs Linux or macOS.

    Args:
        timeout (`float`, *optional*, defaults to 5.0): seconds for a completion, and for a gold answer, before its
            worker is killed. A worker's memory is limited to 1 GiB above what it has at its start (Linux only).
        size (`int`, *optional*): number of workers. `None`: this process's CPU cores, shared by the processes
            that the launcher has started on this machine (`LOCAL_WORLD_SIZE`), at most 16.
    """

    def __init__(self, timeout: float = 5.0, size: int | None = None):
        self.timeout = timeout
        self.size = size
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._unparsable: set[str] = set()
        self._failed_starts = 0

    def check(self, completions: list[str], solution: list[str], describe: bool = False) -> list[Verdict]:
        """
        A verdict for each completion, in their order. Safe to call from several threads, which then take turns.

        Args:
            completions (`list[str]`): texts with an answer.
            solution (`list[str]`): gold answer of each. What is not a text cannot be parsed.
            describe (`bool`, *optional*, defaults to `False`): fill in `gold_parsed` and `answer_parsed`.

        Raises:
            `RuntimeError`: workers cannot be started.
        """
        with self._lock:
            try:
                return self._check(completions, solution, describe)
            except BaseException:  # Ctrl-C, above all: what the workers are doing is of no use to anyone
                self._close()
                raise

    def close(self) -> None:
        """End the workers. The next call starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def _check(self, completions: list[str], solution: list[str], describe: bool) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(completions)
        waiting: dict[str, list[int]] = {}  # gold answer -> its completions that no worker has, last first
        crashed: set[int] = set()
        for index, (_, gold) in reversed(list(enumerate(zip(completions, solution, strict=True)))):
            if isinstance(gold, str) and gold not in self._unparsable:
                waiting.setdefault(gold, []).append(index)
            else:
                verdicts[index] = Verdict(None)

        def skip(gold: str) -> None:
            """No completion of this gold answer can be scored, in this call and later ones."""
            self._unparsable.add(gold)
            for index in waiting.pop(gold, []):
                verdicts[index] = Verdict(None)

        def lost(worker: _Worker, timed_out: bool) -> None:
            """Settle what a worker was doing that timed out or died."""
            self._drop(worker)
            index, gold = worker.index, worker.gold
            if index is None:
                return
            if not timed_out and index not in crashed:
                # Someone else may have killed it. If it is the answer that does, it does so again.
                crashed.add(index)
                waiting.setdefault(gold, []).append(index)
            elif gold in worker.golds:
                verdicts[index] = Verdict(0.0, "[not checked]", "[not checked]", checked=False)
            else:
                logger.warning(
                    f"A gold answer cannot be parsed in {self.timeout:g} s and is not scored: {gold[:80]!r}"
                )
                verdicts[index] = Verdict(None)
                skip(gold)

        def heard(worker: _Worker, answer: dict) -> None:
            """Note a worker's answer."""
            if "ready" in answer:
                worker.ready, self._failed_starts = True, 0
                return
            if "gold" not in answer:
                texts = (answer["gold_parsed"], answer["answer_parsed"]) if describe else ()
                verdicts[worker.index] = Verdict(answer["reward"], *texts)
                worker.index = None
                if answer["retire"]:
                    self._drop(worker)
            elif answer["gold"]:
                worker.golds.add(worker.gold)
                worker.deadline = time.monotonic() + self.timeout
            else:
                verdicts[worker.index] = Verdict(None)
                worker.index = None
                skip(worker.gold)

        while waiting or any(worker.index is not None for worker in self._workers):
            while len(self._workers) < min(self._size(), len(completions)):
                self._workers.append(_Worker(self.timeout))
            for worker in list(self._workers):
                if not (worker.ready and worker.index is None and waiting):
                    continue
                gold = self._choose(worker, waiting)
                index = waiting[gold][-1]
                try:
                    worker.start(index, completions[index], gold, describe)
                except OSError:  # it has died since its last answer
                    self._drop(worker)
                    continue
                waiting[gold].pop()
                if not waiting[gold]:
                    del waiting[gold]

            busy = [worker for worker in self._workers if worker.index is not None or not worker.ready]
            seconds = max(0.0, min(worker.deadline for worker in busy) - time.monotonic()) if busy else 0.0
            spoke = set(wait([worker.connection for worker in busy], timeout=seconds))
            for worker in busy:
                if worker.connection in spoke:
                    try:
                        answer = json.loads(worker.connection.recv_bytes())
                    except (EOFError, OSError):
                        lost(worker, timed_out=False)
                    else:
                        heard(worker, answer)
                elif time.monotonic() > worker.deadline:
                    lost(worker, timed_out=True)
        return verdicts

    def _choose(self, worker: _Worker, waiting: dict[str, list[int]]) -> str:
        """The gold answer whose completions this worker takes next: one it knows, else one that none knows."""
        if worker.gold in waiting:
            return worker.gold

        def preference(gold: str) -> tuple[bool, bool, int]:
            known = any(gold == other.gold or gold in other.golds for other in self._workers)
            return gold in worker.golds, not known, len(waiting[gold])

        return max(waiting, key=preference)

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._failed_starts += not worker.ready
        if self._failed_starts == MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(
                f"{MAX_FAILED_STARTS} processes that check answers ended before they were ready, the last with code "
                f"{worker.process.returncode}. Their messages stand above; `{sys.executable} -c 'import math_verify'` "
                "should succeed, and this machine should have memory and process ids left."
            )

    def _size(self) -> int:
        if self.size is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.size = max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        return self.size
