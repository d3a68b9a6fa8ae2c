"""One thread: the models of the tests are tiny, and more threads would wait for one another, here and in processes."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# No test asserts a time; the folders that a test shares among its examples are meant to be shared.
settings.register_profile(
    "repr", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("repr")
gc.disable()  # until all tests are imported, see repr.cli.importing
torch.set_num_threads(1)
# At its first backward autograd starts a thread for each kind of device that it finds, and a forked process has none of
# them. Tests with fake tensors make it find CUDA; so the first backward comes before all of them.
torch.zeros(1, requires_grad=True).sum().backward()
DEVICE = os.environ.get("TEST_DEVICE", "cuda")
RunGroup = Callable[..., list[tuple[int, str]]]  # what the fixture run_group is


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="write tests/curves anew, see tests/test_experiments.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported for all tests stays, so the collector need not look at it after each of them."""
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none; TEST_DEVICE=cpu rehearses those that can be."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU, for tests marked ``gpu``; or what they are rehearsed on."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random inputs are the same whatever ran before, in this process or in another."""
    torch.manual_seed(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB: three checkpoints of the smallest model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class Ended(NamedTuple):
    """How a process has ended, and what it has printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Ended]]]:
    """Runs ``python -m MODULE ARGUMENTS`` in one or several processes, which need not import all anew.

    ``kill_after`` seconds all of them are killed.
    """
    folder = tmp_path_factory.mktemp("log")
    command = [sys.executable, "-m", "tests.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def processes(world: int, module: str, *arguments: str, kill_after: float | None = None) -> list[Ended]:
            logs = [[str(folder / f"{kind}.{rank}") for kind in ("out", "err")] for rank in range(world)]
            where = [str(Path.cwd()), dict(os.environ)]  # of the test that asks, not of the one that came first
            server.stdin.write(json.dumps([*where, logs, kill_after, module, *arguments]) + "\n")
            server.stdin.flush()
            statuses = json.loads(server.stdout.readline())
            printed = [[Path(log).read_text() for log in of_one] for of_one in logs]
            return [Ended(status, *texts) for status, texts in zip(statuses, printed, strict=True)]

        yield processes
        server.stdin.close()


@pytest.fixture(scope="session")
def run_group(processes: Callable[..., list[Ended]]) -> RunGroup:
    """Runs a command line of ``repr.fit`` in some processes; gives exit status and output of each."""

    def run_group(world: int, *arguments: str, kill_after: float | None = None) -> list[tuple[int, str]]:
        done = processes(world, "repr.fit", *arguments, kill_after=kill_after)
        return [(ended.status, ended.out + ended.err) for ended in done]

    return run_group


@pytest.fixture(scope="session")
def run(run_group: RunGroup) -> Callable[..., tuple[int, str]]:
    """Runs a command line of ``repr.fit`` in a process of its own; gives its exit status and what it has printed."""
    return lambda *arguments: run_group(1, *arguments)[0]


@pytest.fixture(scope="session")
def program(processes: Callable[..., list[Ended]]) -> Callable[..., Ended]:
    """Runs ``python -m MODULE ARGUMENTS`` in a process of its own, which must end with ``status``."""

    def program(module: str, *arguments: str, status: int = 0) -> Ended:
        (ended,) = processes(1, module, *arguments)
        assert ended.status == status, (module, *ended)
        return ended

    return program
