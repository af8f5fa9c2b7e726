"""Several processes compute the same kernel as one."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import BY_NAME
from dense import assert_close

from ntk import compare
from ntk.gradients.function import take
from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.scale.processes import LostProcessError, Processes
from ntk.scale.sharded import ShardedEngine
from ntk.scale.storage import load_kernels
from ntk.spaces.kinds import Bias, Columns, Full, LoRA, Rows

SPACES = {
    "full": Full(),
    "both": Rows(2) + Columns(2),
    "sum": LoRA(2) + Rows(1) + Bias(),
}
CASES = {
    "symmetric": {},
    "other": {"right": "other"},
    "further": {"right": 2, "reduce": "trace"},
    "groups": {"right": 1, "left_bytes": 1},
    "few": {"n": 1, "right": 1},
    "signs": {"kind": "asymmetric_signgd"},
    "definition": {"n": 3, "right": 2, "implementation": "jacobian"},
    "tied": {"family": "deberta", "right": 3},
    "experts": {"family": "mixture", "spaces": {"full": Full()}},
}


def case(family="bert", n=7, right=4, **options):
    """Return the arguments of `compute`, the examples one by one and in pairs."""
    model, whole = BY_NAME[family].build(), BY_NAME[family].inputs(n)
    pairs = [slice(i, i + 2) for i in range(0, n, 2)]
    batches = [take(whole, pair) for pair in pairs]
    if right == "other":
        right = [take(whole, slice(1, 4))]
    spaces, others = options.pop("spaces", SPACES), {}
    if "left_bytes" in options:
        others["left_bytes"] = options.pop("left_bytes")
    return (model, batches, right), {
        "spaces": spaces,
        "options": KernelOptions(**options),
        **others,
    }


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join(rank, size, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return Processes.joined(torch.device("cpu"))


def work(rank, size, port, folder):
    processes = join(rank, size, port)
    try:
        for name, asked in CASES.items():
            arguments, options = case(**asked)
            found = compute(
                *arguments,
                engine=partial(ShardedEngine, processes=processes),
                **options,
            )
            torch.save(found, folder / f"{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow)],
    ids=["two", "three"],
)
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, free_port(), folder), nprocs=request.param)
    return lambda name, rank: torch.load(
        folder / f"{name}-{rank}.pt", weights_only=False
    )


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_one_process(found, name):
    arguments, options = case(**CASES[name])
    expected = compute(*arguments, **options)
    for rank in range(2):
        shared = found(name, rank)
        assert set(shared.kernels) == set(expected.kernels)
        for space in expected.kernels:
            assert_close(shared.kernels[space], expected.kernels[space], of=space)
            assert shared.traces[space] == pytest.approx(
                expected.traces[space], rel=1e-9
            )
        assert shared.sizes == expected.sizes
        assert shared.services == expected.services


# The command, and the loss of a process.

COMMAND = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--standalone", "-m", "ntk.compare", "--shots", "4", "--test-size", "8"),
    *("--rows", "1", "--layers", "0", "--name", "run"),
]


@pytest.mark.slow
def test_the_command(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    assert "2 processes shared the kernels' computation" in done.stdout
    kernels, _ = load_kernels(tmp_path / "run" / "kernels.safetensors")
    alone = ["--shots", "4", "--test-size", "8", "--rows", "1", "--layers", "0"]
    options = ("--output", tmp_path, "--name", "alone", "--no-cache", "--quiet")
    assert compare.main([*alone, *map(str, options)]) == 0
    expected, _ = load_kernels(tmp_path / "alone" / "kernels.safetensors")
    for name, kernel in expected.items():
        assert_close(kernels[name], kernel, 1e-6, of=name)


def lose(rank, size, port, folder):
    """Kill rank 1 in the middle of the passes; the others write the error they get."""
    processes = join(rank, size, port)
    arguments, options = case(n=40)

    def progress(what, done, total):
        if what == "passes" and done >= 6:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)

    start = time.monotonic()
    try:
        compute(
            *arguments,
            engine=partial(ShardedEngine, processes=processes),
            progress=progress,
            **options,
        )
    except LostProcessError as error:
        seconds = time.monotonic() - start
        (folder / f"{rank}.txt").write_text(f"{seconds}\n{error}")


@pytest.mark.slow
def test_the_loss_of_a_process_ends_the_others(tmp_path):
    context = mp.get_context("spawn")
    port = free_port()
    workers = [
        context.Process(target=lose, args=(rank, 3, port, tmp_path))
        for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        seconds, message = (tmp_path / f"{rank}.txt").read_text().split("\n")
        assert float(seconds) < 60
        assert "process" in message
        assert "ended" in message
        assert "Start all of them again" in message
