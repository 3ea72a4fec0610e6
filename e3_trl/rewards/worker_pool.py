"""A pool of processes that check answers, with math-verify or another checker, within hard limits."""

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from heapq import heappop, heappush, heapreplace
from multiprocessing.connection import Connection, wait
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
        reward (`float` or `None`): 1 if the answer is right, 0 if not, `None` if the gold answer cannot be read.
        gold_parsed (`str`): what was read from the gold answer.
        answer_parsed (`str`): what was read from the completion.
        checked (`bool`): `False` if time or memory did not suffice, or the worker died: the reward is then 0, and
            `None` if that was the gold answer's doing.
    """

    reward: float | None
    gold_parsed: str = "[unparseable]"
    answer_parsed: str = "[skipped]"
    checked: bool = True


class _Worker:
    """A worker process: the completion that it checks, until when it may, and the gold answers that it has parsed."""

    def __init__(self, timeout: float, script: Path):
        ours, theirs = socket.socketpair()
        # What is larger than the socket's buffer is only sent as the worker reads, and one that is stopped never does.
        seconds, rest = divmod(timeout, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
        self.connection = Connection(ours.detach())
        with theirs:
            # Not multiprocessing: its "fork" copies a process with CUDA and threads, its "spawn" runs the main script
            # again, with all its imports. In a session of its own a worker does not see the terminal's Ctrl-C.
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno()), str(os.getpid()), str(timeout)],
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
        self.last_try = False  # whether that gold answer has failed in a worker before
        self.deadline = time.monotonic() + START_SECONDS

    def start(self, index: int, completion: str, gold: str, describe: bool) -> None:
        request = {"completion": completion, "solution": gold, "new": gold not in self.golds, "describe": describe}
        # Not as ASCII, in which a Chinese character takes 6 bytes; a model may write half of a surrogate pair.
        self.connection.send_bytes(json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass"))
        self.index, self.gold, self.deadline = index, gold, time.monotonic() + self.timeout

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class _Waiting:
    """
    The completions that no worker has, by gold answer, and which of them a worker takes next.

    That is found without looking at all gold answers: for each kind of choice there is a heap of (minus number of
    completions, gold answer), and an entry that is out of date is corrected or dropped when it comes to the top.

    Args:
        indices (`dict[str, list[int]]`): the completions of each gold answer, the first to be checked last.
        workers (`list[_Worker]`): those that the pool has, at any time.
    """

    def __init__(self, indices: dict[str, list[int]], workers: list[_Worker]):
        self.indices = indices
        self._workers = workers
        self._of_worker: dict[_Worker, list[tuple[int, str]]] = {}
        self._of_nobody: list[tuple[int, str]] = []
        self._of_anyone: list[tuple[int, str]] = []
        for gold in indices:
            self._offer(gold)

    def take(self, worker: _Worker) -> tuple[int, str]:
        """
        The completion that this worker checks next, which does not wait any longer, and its gold answer: one that the
        worker knows, else one that none knows.
        """
        gold = worker.gold if worker.gold in self.indices else self._most(self._of_worker.get(worker, []))
        if gold is None:
            gold = self._most(self._of_nobody, unless=self._is_known)
        if gold is None:
            gold = self._most(self._of_anyone)
        index = self.indices[gold].pop()
        if not self.indices[gold]:
            del self.indices[gold]
        return index, gold

    def put_back(self, index: int, gold: str) -> None:
        self.indices.setdefault(gold, []).append(index)
        self._offer(gold)

    def forget(self, worker: _Worker) -> None:
        """A worker has ended, and with it what it knew."""
        self._of_worker.pop(worker, None)
        for gold in worker.golds | {worker.gold}:
            if gold in self.indices:
                self._offer(gold)

    def _offer(self, gold: str) -> None:
        entry = (-len(self.indices[gold]), gold)
        heappush(self._of_anyone, entry)
        if not self._is_known(gold):
            heappush(self._of_nobody, entry)
        for worker in self._workers:
            if gold in worker.golds:
                heappush(self._of_worker.setdefault(worker, []), entry)

    def _is_known(self, gold: str) -> bool:
        return any(gold == worker.gold or gold in worker.golds for worker in self._workers)

    def _most(self, heap: list[tuple[int, str]], unless=lambda gold: False) -> str | None:
        """The gold answer of a heap with most completions."""
        while heap:
            size, gold = heap[0]
            now = -len(self.indices.get(gold, []))
            if now == 0 or unless(gold):
                heappop(heap)
            elif now != size:
                heapreplace(heap, (now, gold))
            else:
                return gold
        return None


class _Call:
    """A call of [`WorkerPool.check`], with its arguments: the verdicts that it has by now, and what waits for one."""

    def __init__(self, pool: "WorkerPool", completions: list[str], solution: list[str], describe: bool):
        self.pool, self.completions, self.describe = pool, completions, describe
        self.verdicts: list[Verdict | None] = [None] * len(completions)
        self.failed: set[int | str] = set()  # completions and gold answers that have a second and last try
        indices: dict[str, list[int]] = {}
        for index, (_, gold) in reversed(list(enumerate(zip(completions, solution, strict=True)))):
            if not isinstance(gold, str):
                self.verdicts[index] = Verdict(None)
            elif gold in pool._unscored:
                self.verdicts[index] = pool._unscored[gold]
            else:
                indices.setdefault(gold, []).append(index)
        self.waiting = _Waiting(indices, pool._workers)
        if pool._failed_starts >= MAX_FAILED_STARTS:
            pool._failed_starts = 0

    def run(self) -> list[Verdict]:
        workers = self.pool._workers
        while self.waiting.indices or any(worker.index is not None for worker in workers):
            self.pool._start(min(self.pool._size(), len(self.completions)))
            for worker in list(workers):
                if worker.ready and worker.index is None and self.waiting.indices:
                    self.give(worker)
            self.listen([worker for worker in workers if worker.index is not None or not worker.ready])
        return self.verdicts

    def give(self, worker: _Worker) -> None:
        """Have a worker check the completion that is next for it."""
        index, gold = self.waiting.take(worker)
        worker.last_try = gold in self.failed
        try:
            worker.start(index, self.completions[index], gold, self.describe)
        except OSError:  # it has died since its last answer, or reads nothing
            self.drop(worker)
            self.waiting.put_back(index, gold)

    def listen(self, busy: list[_Worker]) -> None:
        """Wait until one of these workers answers, dies or has had its time, and note what each has come to."""
        seconds = max(0.0, min((worker.deadline for worker in busy), default=0.0) - time.monotonic())
        spoke = set(wait([worker.connection for worker in busy], timeout=seconds))
        for worker in busy:
            if worker.connection in spoke:
                try:
                    answer = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    self.lost(worker, timed_out=False)
                else:
                    self.heard(worker, answer)
            elif time.monotonic() > worker.deadline:
                self.lost(worker, timed_out=True)

    def heard(self, worker: _Worker, answer: dict) -> None:
        """Note a worker's answer, as `math_worker.serve` sends them."""
        if "ready" in answer:
            worker.ready, self.pool._failed_starts = True, 0
        elif "reward" in answer:
            texts = (answer["gold_parsed"], answer["answer_parsed"]) if self.describe else ()
            self.verdicts[worker.index] = Verdict(answer["reward"], *texts)
            worker.index = None
            if answer["retire"]:
                self.drop(worker)
        elif answer["gold"]:
            worker.golds.add(worker.gold)
            self.failed.discard(worker.gold)
            worker.deadline = time.monotonic() + self.pool.timeout
        else:
            self.skip(worker, Verdict(None))
            worker.index = None

    def lost(self, worker: _Worker, timed_out: bool) -> None:
        """Settle what a worker was doing that timed out or died."""
        self.drop(worker)
        index, gold = worker.index, worker.gold
        if index is None:
            return
        # A worker may have been killed, or stalled with the disk, by something else than what it was doing. A
        # completion that took too long has no second try: there are too many, and it costs one reward, not all of a
        # problem's.
        is_parsed = gold in worker.golds
        was_last_try = timed_out or index in self.failed if is_parsed else worker.last_try
        if not was_last_try:
            self.failed.add(index if is_parsed else gold)
            self.waiting.put_back(index, gold)
        elif is_parsed:
            self.verdicts[index] = Verdict(0.0, "[not checked]", "[not checked]", checked=False)
        else:
            logger.warning(
                f"A gold answer has twice taken more than {self.pool.timeout:g} s to parse, or ended its worker. Its "
                f"completions are not scored in this run: {gold[:80]!r}"
            )
            self.skip(worker, Verdict(None, "[not checked]", "[not checked]", checked=False))

    def skip(self, worker: _Worker, verdict: Verdict) -> None:
        """No completion of this worker's gold answer can be scored, in this call and later ones."""
        self.pool._unscored[worker.gold] = verdict
        for index in [worker.index, *self.waiting.indices.pop(worker.gold, [])]:
            self.verdicts[index] = verdict

    def drop(self, worker: _Worker) -> None:
        self.pool._drop(worker)
        self.waiting.forget(worker)


class WorkerPool:
    """
    Checks answers, with math-verify if nothing else is given, in processes that are killed and replaced when they
    take too long or die.

    Each worker checks one completion at a time in its main thread, and parses a gold answer once; completions with the
    same gold answer go to the worker that knows it, unless another one would be idle. Workers start at the first call
    and stay. They import their checker only, and end with this process, however it ends. A process forked from this
    one starts its own. Needs Linux or macOS.

    A gold answer whose parse took too long or ended its worker is tried once more; if it fails again, it counts as not
    checked in this and all later calls.

    Args:
        timeout (`float`, *optional*, defaults to 5.0): seconds for a completion, and for a gold answer, before its
            worker is killed. A worker's memory is limited to 1 GiB above what it has at its start (Linux only).
        size (`int`, *optional*): number of workers. `None`: this process's CPU cores, shared by the processes
            that the launcher has started on this machine (`LOCAL_WORLD_SIZE`), at most 16.
        script (`Path`, *optional*): what the workers run. If `None`, math-verify's.
        package (`str`, *optional*, defaults to `"math_verify"`): what that imports, for the message if it cannot.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        size: int | None = None,
        script: Path | None = None,
        package: str = "math_verify",
    ):
        self.timeout = timeout
        self.size = size
        self.script = script
        self.package = package
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._unscored: dict[str, Verdict] = {}  # gold answers that no completion is compared with, for good
        self._failed_starts = 0  # since a worker was ready

    def check(self, completions: list[str], solution: list[str], describe: bool = False) -> list[Verdict]:
        """
        A verdict for each completion, in their order. Safe to call from several threads, which then take turns.

        Args:
            completions (`list[str]`): texts with an answer.
            solution (`list[str]`): gold answer of each. What is not a text cannot be parsed.
            describe (`bool`, *optional*, defaults to `False`): fill in `gold_parsed` and `answer_parsed`.

        Raises:
            `RuntimeError`: workers cannot be started, and none is left that works.
        """
        with self._lock:
            try:
                return _Call(self, completions, solution, describe).run()
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

    def _start(self, count: int) -> None:
        """Have `count` workers, or fewer if starting them fails."""
        while len(self._workers) < count and self._failed_starts < MAX_FAILED_STARTS:
            try:
                self._workers.append(_Worker(self.timeout, self.script or WORKER))
            except OSError as error:  # no memory, process ids or file descriptors left
                self._start_failed(str(error))

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        if not worker.ready:
            self._start_failed(f"ended with code {worker.process.returncode}")
        elif not any(other.ready for other in self._workers):
            self._failed_starts = 0  # the last that worked, so that a new one has to start

    def _start_failed(self, how: str) -> None:
        """Note a failed start; an error if it was one too many, and no worker is left that works or may yet."""
        self._failed_starts += 1
        if self._failed_starts < MAX_FAILED_STARTS:
            return
        message = (
            f"{self._failed_starts} processes that check answers were not ready within {START_SECONDS} s, the last: "
            f"{how}. Their messages stand above; `{sys.executable} -c 'import {self.package}'` should succeed, and "
            "this machine should have memory and process ids left."
        )
        if not self._workers:
            raise RuntimeError(message)
        if self._failed_starts == MAX_FAILED_STARTS:
            logger.warning(f"{message} The {len(self._workers)} others go on; no more are started in this call.")

    def _size(self) -> int:
        if self.size is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.size = max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        return self.size
