"""
Python in processes of their own that start in no time: forked from one that has imported what takes long.

To import torch, TRL, DeepSpeed and vLLM takes a core ten seconds or more, longer than what most tests then do. It is
not for what looks at the imports themselves, at what is installed, or at environment variables that libraries read
while they are imported. Nothing is compiled there, which the rest of an engine's start would be.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock


IMPORTED = ("conftest", "e3_trl.trainer", "deepspeed", "vllm")


class Forked:
    """
    A process that was started by [`Forks.start`].

    Attributes:
        pid (`int`): its number.
        stdout, stderr (`Path`): what it has written.
    """

    def __init__(self, pid: int, folder: Path):
        self.pid = pid
        self.stdout, self.stderr, self._status = folder / "stdout", folder / "stderr", folder / "status"

    def poll(self) -> int | None:
        """How it ended, as `subprocess` says it; `None` while it runs."""
        return int(self._status.read_text()) if self._status.exists() else None

    def kill(self) -> None:
        """End it, if it has not."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 900) -> int:
        """
        Wait until it has ended.

        Raises:
            `subprocess.TimeoutExpired`: after so many seconds, when it has been killed.
        """
        deadline = time.monotonic() + timeout
        while (returncode := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.pid), timeout, stderr=self.stderr.read_text())
            time.sleep(0.02)
        return returncode


class Forks:
    """The process that the others are forked from. It starts with the first of them."""

    def __init__(self):
        self._server: subprocess.Popen | None = None
        self._folder = TemporaryDirectory(prefix="forked-")
        self._number = 0

    def start(self, *command: str, cwd=None, env: dict | None = None, new_session: bool = False) -> Forked:
        """
        Start what `python` with these arguments would.

        Args:
            command (`str`): `-m module ...`, `-c program ...` or `script.py ...`.
            cwd (`str`, *optional*): folder to run it in.
            env (`dict`, *optional*): its whole environment.
            new_session (`bool`): whether it leads a session, and a group, of its own.
        """
        if self._server is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_COMPILE_DISABLE": "1"}
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        self._number += 1
        folder = Path(self._folder.name) / str(self._number)
        folder.mkdir()
        env = dict(os.environ) if env is None else env
        asked = {"command": command, "cwd": str(cwd or os.getcwd()), "env": env, "folder": str(folder)}
        print(json.dumps(asked | {"new_session": new_session}), file=self._server.stdin, flush=True)
        return Forked(int(self._server.stdout.readline()), folder)

    def run(self, *command: str, timeout: float = 900, **kwargs) -> subprocess.CompletedProcess:
        """Like `subprocess.run` with `text` and `capture_output`; further arguments as in [`Forks.start`]."""
        process = self.start(*command, **kwargs)
        returncode = process.wait(timeout)
        return subprocess.CompletedProcess(command, returncode, process.stdout.read_text(), process.stderr.read_text())

    def launch(self, arguments: list[str], *command: str, timeout=900, **kwargs) -> subprocess.CompletedProcess:
        """
        What `accelerate launch` does on one machine: [`Forks.run`] for each rank, with what that adds to the
        environment. When a rank fails the others are ended, half a minute later, so that they can say what they met.

        Args:
            arguments (`list[str]`): the launcher's own.
            command (`str`): what each rank runs, as in [`Forks.start`].
        """
        launched, env = environment_of(arguments), kwargs.pop("env", dict(os.environ))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env = env | launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        num_ranks = launched["WORLD_SIZE"]
        env |= {"LOCAL_WORLD_SIZE": num_ranks}
        ranks = [
            self.start(*command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **kwargs)
            for rank in range(int(num_ranks))
        ]
        deadline = time.monotonic() + timeout
        while None in (ends := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
            if any(ends):
                deadline = min(deadline, time.monotonic() + 30)
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
        returncode = max(abs(rank.wait()) for rank in ranks)
        stdout, stderr = ("".join(getattr(rank, name).read_text() for rank in ranks) for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    def close(self):
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()


def environment_of(arguments: list[str]) -> dict[str, str]:
    """What `accelerate launch` with these arguments adds to the environment of all ranks, and their number."""
    from accelerate.commands import launch

    seen = []
    with mock.patch.multiple(launch, deepspeed_launcher=seen.append, multi_gpu_launcher=seen.append):
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    if seen[0].use_deepspeed:
        _, environment = launch.prepare_deepspeed_cmd_env(seen[0])
    else:
        environment = launch.prepare_multi_gpu_env(seen[0])
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return changed | {"WORLD_SIZE": str(seen[0].num_processes)}


def become(command: list[str], cwd: str, env: dict, folder: str, new_session: bool) -> None:
    """In the forked process: be what `python *command` would be, until it ends."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first, *rest = command
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(first).parent.resolve()) if first.endswith(".py") else cwd, *paths, *sys.path]
    if first == "-m":
        name, *rest = rest
        sys.argv = [name, *rest]
        sys.modules.pop(name, None)  # or it is warned of
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        program, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def serve() -> None:
    """Fork what is asked for on stdin, line by line, and write how each ended into its folder."""
    folders: dict[int, str] = {}

    def write_ends(*args):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            path = Path(folders.pop(pid)) / "status"
            path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix(".new").rename(path)

    for line in sys.stdin:
        asked = json.loads(line)
        for name in ("stdout", "stderr"):
            (Path(asked["folder"]) / name).touch()
        # A child that ends at once is to be found in `folders`.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        signal.signal(signal.SIGCHLD, write_ends)
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            become(**asked)
            return
        folders[pid] = asked["folder"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        print(pid, flush=True)


if __name__ == "__main__":
    for module in IMPORTED:
        with contextlib.suppress(ImportError):  # what is not installed, its tests skip by name
            importlib.import_module(module)
    if "deepspeed" in sys.modules:  # as in benchmarks/gpu/sharding.py
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    serve()
