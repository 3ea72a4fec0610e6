"""The math rewards: TRL's verdicts, and limits that hold whatever a model writes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import logged, make_dataset
from trl.rewards import accuracy_reward, reasoning_accuracy_reward

from e3_trl import math_accuracy_reward, math_reasoning_accuracy_reward
from e3_trl.rewards import accuracy as rewards
from e3_trl.rewards import load_reward_func, worker_pool
from e3_trl.rewards.worker_pool import WorkerPool, _Waiting


ROOT = Path(__file__).parents[2]
TOWER = r"\boxed{9^{9^{9^9}}}"  # one multiplication in C, which no Python signal handler interrupts

# Completion and gold answer, in the forms of the paper's data.
ORDINARY = [
    (r"So \boxed{\frac{1}{2}}.", "$0.5$"),
    (r"So \boxed{\dfrac{17}{50}}.", r"\frac{17}{50}"),
    (r"So \boxed{0.34}.", r"\dfrac{17}{50}"),
    (r"First \boxed{3}, no: \boxed{4}", "4"),
    (r"First \boxed{4}, no: \boxed{3}", "4"),
    ("The final answer is $48$. I hope it is correct.", "48"),
    ("The answer is 48", "48"),
    ("It is $48$", "48"),
    (r"\[x = 2\sqrt{5}\] so \boxed{2\sqrt{5}}", r"$2 \sqrt{5}$"),
    (r"\boxed{\sqrt{20}}", r"$2 \sqrt{5}$"),
    (r"\boxed{\sqrt{21}}", r"$2 \sqrt{5}$"),
    (r"\boxed{2\sqrt{5}}", r"2 \sqrt{5}"),
    (r"\boxed{150^\circ}", r"150^\circ"),
    (r"\boxed{150}", r"$150^\circ$"),
    (r"\boxed{1,2,3}", "$1,2,3$"),
    (r"\boxed{3,2,1}", "$1,2,3$"),
    (r"\boxed{\{1,2\}}", "$1,2,3$"),
    (r"\boxed{(1,-16,-4,43)}", "$(1,-16,-4,43)$"),
    (r"\boxed{[2,5)}", "$[2,5)$"),
    (r"\boxed{(2,5)}", "$[2,5)$"),
    (r"\boxed{x \in [2,5)}", "$[2,5)$"),
    (r"\boxed{1 \pm \sqrt{19}}", r"$1 \pm \sqrt{19}$"),
    (r"\boxed{n^2 - n + 1}", "$n(n-1)+1$"),
    (r"\boxed{n^2 + n + 1}", "$n(n-1)+1$"),
    (r"\boxed{-\pi \log 2}", r"$-\pi \log 2$"),
    (r"\boxed{\text{Wednesday}}", r"\text{Wednesday}"),
    (r"\boxed{\text{Wednesday}}", r"$\text{Wednesday}$"),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"$\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$"),
    (r"\boxed{12{,}000}", "12000"),
    (r"\boxed{25\%}", "$0.25$"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{3 + 4i}", "$3+4i$"),
    (r"\boxed{x = 7}", "7"),
    (r"\boxed{", "7"),
    (r"\boxed{}", "7"),
    ("", "7"),
    (r"\boxed{7}", ""),
    (r"\boxed{7}", r"\text{Basil}"),
    ("\\boxed{7}\n\ud800 \x00", "7"),
]

HOSTILE = {
    "tower of powers": TOWER,
    "nested factorials": r"\boxed{((((10!)!)!)!)!}",
    "one factorial": r"\boxed{100000000!}",
    "polynomial": r"\boxed{(1+x)^{100000}(1+y)^{100000}}",
    "sum": r"\boxed{\sum_{k=1}^{10000000} \frac{1}{k^k}}",
    "binomial": r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    "integral": r"\boxed{\int \frac{\sin(x^x)}{\ln x^{x}} dx}",
    "powers": r"\boxed{" + "2^" * 5000 + "2}",
    "carets": r"\boxed{2" + "^" * 5000 + "2}",
    "minus signs": r"\boxed{" + "-" * 5000 + "1}",
    "digits": r"\boxed{" + "9" * 100000 + "}",
    "list": r"\boxed{" + ",".join(map(str, range(20000))) + "}",
    "unclosed boxes": r"\boxed{" * 20000,
    "roots": r"\boxed{" + r"\sqrt{" * 20000 + "}",
    "brackets": r"\boxed{" + r"\left(" * 20000 + "}",
    "symbols": r"\boxed{" + r"\pi" * 20000 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{2}" * 20000 + "}",
    "dollars": "$" * 20000,
    "answers": "answer is " * 20000,
}

# A worker in which every text that is parsed is written to the file `PARSED`. "crash" in it is a segmentation fault;
# "killed" is a SIGKILL when it is parsed first, as if from someone else; "stall" is a pause when it is parsed first by
# as many workers as the word after it says; "wait" is one until there is a file of its name.
SPY = f"""
import os, runpy, signal, sys, time
import math_verify

parse = math_verify.parse

def spy(text, *args, **kwargs):
    if "crash" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "killed" in text and not os.path.exists(mark := os.environ["PARSED"] + text):
        open(mark, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if "stall" in text:
        with open(os.environ["PARSED"] + text, "a+") as stalls:
            stalls.write("x")
            stalls.flush()
            while os.path.getsize(stalls.name) <= int(text.split()[1]):
                signal.pause()
    while "wait" in text and not os.path.exists(os.environ["PARSED"] + text):
        time.sleep(0.01)
    with open(os.environ["PARSED"], "a") as file:
        file.write(text + "\\n")
    return parse(text, *args, **kwargs)

math_verify.parse = spy
runpy.run_path({str(worker_pool.WORKER)!r}, run_name="__main__")
"""


# A worker that answers without parsing anything.
QUICK = """
import json, sys
from multiprocessing.connection import Connection

connection = Connection(int(sys.argv[1]))
connection.send_bytes(b'{"ready": true}')
while True:
    if json.loads(connection.recv_bytes())["new"]:
        connection.send_bytes(b'{"gold": true}')
    connection.send_bytes(b'{"reward": 1.0, "retire": false}')
"""


@dataclass(eq=False)
class Known:
    """What counts in a worker when completions are given out."""

    golds: set[str]
    gold: str


@pytest.fixture
def make_pool():
    """A pool of two workers that is closed after the test."""
    pools = []

    def make(timeout: float = 5.0, size: int | None = 2) -> WorkerPool:
        pools.append(WorkerPool(timeout, size))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def spy(monkeypatch, tmp_path):
    """Put [`SPY`] in the workers' place and return a function that counts how often a text was parsed."""
    (tmp_path / "spy.py").write_text(SPY)
    monkeypatch.setattr(worker_pool, "WORKER", tmp_path / "spy.py")
    monkeypatch.setenv("PARSED", str(tmp_path / "parsed"))
    return lambda text: (tmp_path / "parsed").read_text().splitlines().count(text)


def scores(verdicts) -> list[float | None]:
    return [verdict.reward for verdict in verdicts]


def ends(pids: list[int], seconds: float) -> bool:
    """Whether all of these processes end within `seconds`."""
    until = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_verdicts_and_columns_are_trls():
    texts, golds = [text for text, _ in ORDINARY], [gold for _, gold in ORDINARY]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    expected_columns, columns = {}, {}
    expected = accuracy_reward(messages, golds, log_extra=expected_columns.__setitem__)
    assert {None, 0.0, 1.0} == set(expected)
    assert math_accuracy_reward(texts, golds) == expected
    assert math_accuracy_reward(messages, golds, log_extra=columns.__setitem__, prompts=texts) == expected
    assert columns == expected_columns

    thoughts = ["<think>{}", "<think>{}</think>", "<think>a</think>{}", r"{}</think>\boxed{{7}}</think>{}"]
    texts = [thoughts[index % 4].format(text, text) for index, text in enumerate(texts)]
    messages = [[{"content": text}] for text in texts]
    expected = reasoning_accuracy_reward(messages, golds, log_extra=expected_columns.__setitem__)
    assert {None, 0.0, 1.0} == set(expected)
    assert math_reasoning_accuracy_reward(texts, golds) == expected
    assert math_reasoning_accuracy_reward(messages, golds, log_extra=columns.__setitem__) == expected
    assert columns == expected_columns


def test_both_answer_styles_have_a_name_in_recipes():
    assert load_reward_func("math_accuracy_reward") is math_accuracy_reward
    assert load_reward_func("math_reasoning_accuracy_reward") is math_reasoning_accuracy_reward


def test_what_cannot_be_scored():
    assert math_accuracy_reward([], []) == []
    assert math_accuracy_reward([r"\boxed{7}", r"\boxed{7}", [{"content": None}]], [None, 7, "7"]) == [None, None, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        math_accuracy_reward([r"\boxed{7}", r"\boxed{7}"], ["7"])


@pytest.mark.slow
def test_hostile_completions_get_0_in_time_and_their_neighbours_what_they_deserve(make_pool):
    pool = make_pool(timeout=1)
    completions = [text for hostile in HOSTILE.values() for text in (hostile, r"\boxed{-2}")]
    pool.check([""], ["1"])
    start = time.monotonic()
    verdicts = pool.check(completions, ["$-2$"] * len(completions), describe=True)
    assert time.monotonic() - start < 60
    assert scores(verdicts) == [0.0, 1.0] * len(HOSTILE)
    checked = dict(zip(HOSTILE, [verdict.checked for verdict in verdicts[::2]], strict=True))
    assert not checked["tower of powers"]
    assert checked["carets"]
    assert all(verdict.checked for verdict in verdicts[1::2])


@pytest.mark.slow
def test_a_worker_that_eats_memory_fails_alone(make_pool):
    pool = make_pool(size=1)
    pool.check([""], ["1"])
    worker = pool._workers[0].process.pid
    address_space = psutil.Process(worker).memory_info().vms
    soft, hard = resource.prlimit(worker, resource.RLIMIT_AS)
    assert soft == hard
    assert 0.9 * 2**30 < soft - address_space < 1.1 * 2**30
    # Closer to the limit, so that the test does not have to fill a gigabyte.
    limit = address_space + 2**25
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, limit))
    start = time.monotonic()
    assert scores(pool.check([HOSTILE["polynomial"], r"\boxed{1}"], ["1", "1"])) == [0.0, 1.0]
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_an_answer_that_kills_its_worker_gets_0(make_pool, spy):
    pool = make_pool()
    verdicts = pool.check([r"\boxed{1}", "crash", r"\boxed{1}", "a"], ["1", "1", "1", "crash"])
    assert scores(verdicts) == [1.0, 0.0, 1.0, None]
    assert [verdict.checked for verdict in verdicts] == [True, False, True, False]


@pytest.mark.slow
def test_a_worker_killed_by_someone_else_changes_no_verdict(make_pool, spy):
    pool = make_pool()
    pool.check(["", ""], ["1", "1"])
    idle = next(worker for worker in pool._workers if worker.ready).process
    idle.kill()
    idle.wait()
    answers = [str(index % 7) for index in range(60)]
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    completions[10] += " killed (10)"
    completions[50] += " killed (50)"
    verdicts = pool.check(completions, ["3"] * 60)
    assert [spy(completions[index]) for index in (10, 50)] == [1, 1], "each was parsed once, by another worker"
    assert all(Path(os.environ["PARSED"] + completions[index]).exists() for index in (10, 50))
    assert scores(verdicts) == [float(answer == "3") for answer in answers]
    assert all(verdict.checked for verdict in verdicts)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.slow
def test_a_worker_parses_a_gold_answer_once(make_pool, spy, size):
    pool = make_pool(size=size)
    golds = [f"${gold}$" for gold in range(20) for _ in range(8)]
    completions = [r"\boxed{7}"] * len(golds)
    expected = [float(gold == "$7$") for gold in golds]
    assert scores(pool.check(completions, golds)) == expected
    assert scores(pool.check(completions[::-1], golds[::-1])) == expected[::-1]
    assert {spy(f"${gold}$") for gold in range(20)} <= set(range(1, size + 1))


def test_the_worker_that_knows_a_gold_answer_gets_its_completions():
    one, other = Known({"1", "2"}, "2"), Known({"3"}, "3")
    waiting = _Waiting({"1": [0], "3": [1, 2, 3], "4": [4], "5": [6, 5]}, [one, other])
    assert waiting.take(other) == (3, "3")  # the one before
    assert waiting.take(one) == (0, "1")  # known
    assert waiting.take(one) == (5, "5")  # known to nobody, most completions
    waiting = _Waiting({"3": [1], "": [2, 3]}, [one, Known({"3", ""}, "3")])
    assert waiting.take(one) == (3, "")  # helps out where there is most to do
    assert waiting.take(one) == (2, "")
    assert waiting.take(one) == (1, "3")
    assert not waiting.indices
    waiting.put_back(1, "3")
    assert waiting.take(one) == (1, "3")


def test_the_next_completion_is_found_without_looking_at_every_gold_answer(make_pool, monkeypatch, tmp_path):
    """All gold answers that waited were looked at for each completion: 16,000 took 110 s."""
    (tmp_path / "quick.py").write_text(QUICK)
    monkeypatch.setattr(worker_pool, "WORKER", tmp_path / "quick.py")
    lookups = 0

    class Gold(str):
        def __hash__(self):
            nonlocal lookups
            lookups += 1
            return super().__hash__()

    per_completion = {}
    for number in (100, 800):
        lookups = 0
        golds = [Gold(f"{number}, {index}") for index in range(number)]
        assert scores(make_pool().check(["a"] * number, golds)) == [1.0] * number
        per_completion[number] = lookups / number
    assert per_completion[800] < 1.5 * per_completion[100]


@pytest.mark.slow
def test_a_gold_answer_that_cannot_be_parsed_costs_its_time_in_one_call_and_shows_in_all(
    make_pool, spy, caplog, monkeypatch
):
    pool = make_pool(timeout=1, size=1)
    monkeypatch.setattr(rewards, "_POOL", pool)
    gold = HOSTILE["symbols"]
    for _ in range(2):
        metrics = {}
        golds = ["", gold, gold, "$7$"]
        assert math_accuracy_reward([r"\boxed{7}"] * 4, golds, log_metric=metrics.__setitem__) == [None, None, None, 1]
        # That the first one has no answer in it was found out.
        assert metrics == {"rewards/math_accuracy_reward/unchecked": 0.5}
    assert r"\\pi" in caplog.text
    assert spy(gold) == 2
    assert spy("") == 1


@pytest.mark.slow
def test_a_gold_answer_survives_a_stall(make_pool, spy):
    """One stall of the disk or of the machine took a problem out of the run for good."""
    pool = make_pool(timeout=2)
    while not (len(pool._workers) == 2 and all(worker.ready for worker in pool._workers)):
        pool.check(["", ""], ["1", "1"])
    # Both workers stall on it at once, which is still one stall.
    verdicts = pool.check([r"\boxed{7}", r"\boxed{8}", r"\boxed{7}"], ["stall 2 $7$"] * 3)
    assert scores(verdicts) == [1.0, 0.0, 1.0]
    assert all(verdict.checked for verdict in verdicts)


@pytest.mark.slow
def test_a_stopped_worker_is_not_waited_for_when_an_answer_is_larger_than_its_buffer(make_pool):
    """`send_bytes` waited for it for ever: a buffer holds some 200 kB."""
    pool = make_pool(timeout=1, size=1)
    pool.check([""], ["1"])
    worker = pool._workers[0].process
    worker.send_signal(signal.SIGSTOP)
    results = []
    answers = [r"\boxed{7}" + "a" * 1_000_000, "数" * 400_000 + r"\ud800 \boxed{7}"]
    thread = threading.Thread(target=lambda: results.extend(scores(pool.check(answers, ["7", "7"]))))
    thread.start()
    thread.join(30)
    is_over = not thread.is_alive()
    worker.kill()
    thread.join()
    assert is_over
    assert results == [1.0, 1.0]


@pytest.mark.slow
def test_any_thread_and_several_at_once(make_pool):
    pool = make_pool(timeout=1)
    results = {}

    def check(thread: int) -> None:
        results[thread] = scores(pool.check([rf"\boxed{{{n}}}" for n in range(30)] + [TOWER], [str(thread)] * 31))

    threads = [threading.Thread(target=check, args=[thread]) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {thread: [float(n == thread) for n in range(30)] + [0.0] for thread in range(3)}


def test_workers_start_once_import_no_torch_and_share_the_cores(make_pool, monkeypatch):
    pool = make_pool()
    pool.check(["", ""], ["1", "1"])
    workers = [worker.process.pid for worker in pool._workers]
    pool.check(["", ""], ["1", "1"])
    assert [worker.process.pid for worker in pool._workers] == workers
    assert "libtorch" not in Path(f"/proc/{workers[0]}/maps").read_text()  # vLLM preloads torch's libgomp everywhere

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    for ranks, size in {None: 8, "2": 4, "3": 2, "16": 1}.items():
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert make_pool(size=None)._size() == size


def test_workers_that_do_not_start_are_an_error(make_pool, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    pool = make_pool()
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "WORKER", tmp_path / "broken.py")
        with pytest.raises(RuntimeError, match="code 3"):
            pool.check(["", ""], ["1", "1"])
    assert scores(pool.check([r"\boxed{1}"], ["1"])) == [1.0]


def test_slow_starts_do_not_end_a_run_while_a_worker_works(make_pool, spy, monkeypatch, tmp_path, caplog):
    pool = make_pool(timeout=60)
    pool.check([""], ["1"])  # starts one
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(worker_pool, "WORKER", tmp_path / "slow.py")
    monkeypatch.setattr(worker_pool, "START_SECONDS", 0.1)
    kill, started = worker_pool._Worker.kill, []

    def count(worker):
        kill(worker)
        started.append(worker)
        if len(started) == 3:
            # Until now the one that works is at its first answer.
            Path(os.environ["PARSED"] + r"\boxed{1} wait").touch()

    monkeypatch.setattr(worker_pool._Worker, "kill", count)
    assert scores(pool.check([r"\boxed{1} wait", r"\boxed{1}"], ["1", "1"])) == [1.0, 1.0]
    assert len(started) == 3, "no more were started in this call"
    assert "The 1 others go on" in caplog.text
    # When the one that works is killed, nobody is left.
    with pytest.raises(RuntimeError, match="processes that check answers"):
        pool.check(["crash", "crash"], ["1", "1"])


def test_a_machine_without_process_ids_does_not_end_a_run_while_a_worker_works(make_pool, monkeypatch, caplog):
    def refuse(timeout, script):
        raise BlockingIOError("Resource temporarily unavailable")

    pool = make_pool()
    pool.check([""], ["1"])  # starts one
    monkeypatch.setattr(worker_pool, "_Worker", refuse)
    assert scores(pool.check([r"\boxed{1}"] * 2, ["1", "1"])) == [1.0, 1.0]
    assert "Resource temporarily unavailable" in caplog.text
    pool.close()
    with pytest.raises(RuntimeError, match="Resource temporarily unavailable"):
        pool.check([r"\boxed{1}"] * 2, ["1", "1"])


# Loads the pool without e3_trl's other imports, which take seconds.
SCRIPT = """
import os, sys
sys.path.append("e3_trl/rewards")
from worker_pool import WorkerPool

pool = WorkerPool(timeout=float(sys.argv[1]), size=2)
pool.check(["", ""], ["1", "1"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("answer", "timeout"),
    # A worker sees that its parent has ended, but not during a multiplication in C, which goes on until the limit.
    [(None, 60), (HOSTILE["sum"], 60), (TOWER, 2)],
    ids=["idle", "python", "c"],
)
def test_no_process_is_left(how, answer, timeout):
    work = f"pool.check([{answer!r}] * 50, ['1'] * 50)" if answer else "import time; time.sleep(60)"
    script = SCRIPT + "print(*[worker.process.pid for worker in pool._workers], flush=True)\n" + work
    command = [sys.executable, "-c", script, str(timeout)]

    def hear_ctrl_c() -> None:  # which a shell's background jobs, and so these tests in one, are made deaf to
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=hear_ctrl_c
    ) as process:
        try:
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2
            time.sleep(0.3)
            process.send_signal(how)
            assert process.wait(10) != 0
        finally:
            process.kill()
    assert ends(workers, 20)


@pytest.mark.slow
def test_a_fork_has_workers_of_its_own():
    script = (
        SCRIPT
        + r"""
workers = [worker.process.pid for worker in pool._workers]
child = os.fork()
right = [verdict.reward for verdict in pool.check([r"\boxed{1}"] * 50, ["1"] * 50)] == [1.0] * 50
own = {worker.process.pid for worker in pool._workers}
if child == 0:
    os._exit(0 if right and not own & set(workers) else 1)
assert right and own == set(workers)
assert os.waitpid(child, 0)[1] == 0
"""
    )
    subprocess.run([sys.executable, "-c", script, "5"], cwd=ROOT, check=True, timeout=60)


@pytest.mark.slow
def test_a_run_logs_what_was_not_checked(make_trainer, make_pool, monkeypatch):
    monkeypatch.setattr(rewards, "_POOL", make_pool(timeout=0.5))
    # The tiny model writes no LaTeX.
    monkeypatch.setattr(rewards, "_texts", lambda completions: [TOWER] + [r"\boxed{1}"] * (len(completions) - 1))
    dataset = make_dataset()
    trainer = make_trainer(
        reward_funcs=math_accuracy_reward,
        train_dataset=dataset.add_column("solution", ["1"] * len(dataset)),
        max_steps=2,
    )
    trainer.train()
    assert logged(trainer, "rewards/math_accuracy_reward/unchecked") == [1 / 16] * 2
    assert logged(trainer, "rewards/math_accuracy_reward/mean") == [15 / 16] * 2
