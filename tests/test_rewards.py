"""The math rewards: TRL's verdicts, and limits that hold whatever a model writes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import logged, make_dataset
from trl.rewards import accuracy_reward, reasoning_accuracy_reward

from e3_trl import math_accuracy_reward, math_reasoning_accuracy_reward
from e3_trl.rewards import accuracy as rewards
from e3_trl.rewards import load_reward_func, worker_pool
from e3_trl.rewards.worker_pool import WorkerPool


ROOT = Path(__file__).parent.parent
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
# "killed" is a SIGKILL when it is parsed first, as if from someone else.
SPY = f"""
import os, runpy, signal, sys
import math_verify

parse = math_verify.parse

def spy(text, *args, **kwargs):
    if "crash" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "killed" in text and not os.path.exists(mark := os.environ["PARSED"] + text):
        open(mark, "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    with open(os.environ["PARSED"], "a") as file:
        file.write(text + "\\n")
    return parse(text, *args, **kwargs)

math_verify.parse = spy
runpy.run_path({str(worker_pool.WORKER)!r}, run_name="__main__")
"""


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


def test_an_answer_that_kills_its_worker_gets_0(make_pool, spy):
    pool = make_pool()
    verdicts = pool.check([r"\boxed{1}", "crash", r"\boxed{1}", "a"], ["1", "1", "1", "crash"])
    assert scores(verdicts) == [1.0, 0.0, 1.0, None]
    assert [verdict.checked for verdict in verdicts] == [True, False, True, True]


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
def test_a_worker_parses_a_gold_answer_once(make_pool, spy, size):
    pool = make_pool(size=size)
    golds = [f"${gold}$" for gold in range(20) for _ in range(8)]
    completions = [r"\boxed{7}"] * len(golds)
    expected = [float(gold == "$7$") for gold in golds]
    assert scores(pool.check(completions, golds)) == expected
    assert scores(pool.check(completions[::-1], golds[::-1])) == expected[::-1]
    assert {spy(f"${gold}$") for gold in range(20)} <= set(range(1, size + 1))


def test_the_worker_that_knows_a_gold_answer_gets_its_completions(make_pool):
    pool = make_pool()
    pool.check(["", ""], ["1", "2"])
    one, other = pool._workers
    one.golds, other.golds = {"1", "2"}, {"3"}
    one.gold, other.gold = "2", "3"
    waiting = {"1": [0], "3": [1, 2, 3], "4": [4], "5": [5, 6]}
    assert pool._choose(one, waiting) == "1"  # known
    assert pool._choose(other, waiting) == "3"  # the one before
    del waiting["1"]
    assert pool._choose(one, waiting) == "5"  # known to nobody, most completions
    assert pool._choose(one, {"3": [1]}) == "3"  # helps out


def test_a_gold_answer_that_cannot_be_parsed_costs_its_time_once(make_pool, spy, caplog):
    pool = make_pool(timeout=1, size=1)
    gold = HOSTILE["symbols"]
    assert scores(pool.check([r"\boxed{7}"] * 3, ["", gold, gold])) == [None, None, None]
    assert r"\\pi" in caplog.text
    assert scores(pool.check([r"\boxed{7}"] * 3, ["", gold, gold])) == [None, None, None]
    assert spy(gold) == 1
    assert spy("") == 1


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


# Loads the pool without e3_trl's other imports, which take seconds.
SCRIPT = """
import os, sys
sys.path.append("e3_trl/rewards")
from worker_pool import WorkerPool

pool = WorkerPool(timeout=float(sys.argv[1]), size=2)
pool.check(["", ""], ["1", "1"])
"""


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
