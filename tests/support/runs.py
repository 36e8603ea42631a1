"""Whole training runs, several per set of processes, since importing LLaMA-Factory takes longer than a tiny run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from dataflex_mega import plots
from dataflex_mega.distributed.orphans import die_with_parent
from dataflex_mega.distributed.testing import free_port, run_distributed_test


def base(folder, **keys):
    """A pre-training run on the three domains; `keys` change it."""
    config = {
        "model_name_or_path": str(folder / "model"),
        "stage": "pt",
        "dataset_dir": str(folder / "data"),
        "dataset": "code,prose,tables",
        "cutoff_len": 32,
        "finetuning_type": "full",
        "output_dir": str(folder / "out" / "run"),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1.0e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "tensorboard": False,
        "seed": 3,
    }
    config.update(keys)
    return {key: value for key, value in config.items() if value is not None}


def train_many(world, configs, run=None, plain=False):
    """Train each configuration in `world` processes -> [(exit status, standard error of rank 0)].

    The processes are forked from a server that has imported everything; they do not see changes of os.environ.

    Args:
        run: what is called with each configuration, defined at the top of a module; `train_here` unless given.
        plain: one process without torchrun's variables.
    """
    _fork_server()
    with tempfile.TemporaryDirectory() as folder:  # a pipe holds 64 KB, and nobody reads it before the processes end
        results = Path(folder) / "results.pickle"
        arguments = (world, free_port(), configs, plain, results, run or train_here)
        mp.start_processes(_process, arguments, nprocs=world, join=True, start_method="forkserver")
        return pickle.loads(results.read_bytes())


def run_forked(function, world, *arguments):
    """`run_distributed_test` in processes forked from a server that has imported everything."""
    _fork_server()
    return run_distributed_test(function, world, *arguments, start_method="forkserver")


def _fork_server():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


def _process(rank, world, port, configs, plain, path, run):
    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    if plain:
        results = [run(config) for config in configs]
    else:
        results = _run_in_one_group(rank, world, port, configs, run)
    if rank == 0:
        path.write_bytes(pickle.dumps(results))


def _run_in_one_group(rank, world, port, configs, run):
    """All runs inside one process group: gloo can hang when a process leaves one and joins another."""
    from dataflex_mega.distributed import parallel_info

    as_torchrun(rank, world, port)
    parallel_info.init_distributed()
    with mock.patch.object(dist, "destroy_process_group"):
        results = [run(config) for config in configs]
    parallel_info.shutdown_distributed(orderly=True)
    return results


def as_torchrun(rank, world, port):
    """The variables that torchrun sets."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip


def train_here(config):
    """Train in this process -> (exit status, standard error). Pictures, which take longer than a tiny run, with `plot_loss`
    only."""
    from accelerate.state import AcceleratorState, PartialState

    from dataflex_mega.train import main

    AcceleratorState._reset_state(True)  # what a fresh process has: it remembers the process group of the last run
    PartialState._reset_state()
    path = _config_path(config["output_dir"])
    path.write_text(yaml.safe_dump(config))
    stderr = io.StringIO()
    pictures = (
        contextlib.nullcontext() if config.get("plot_loss") else mock.patch.object(plots, "plot_run", lambda _: [])
    )
    with contextlib.redirect_stderr(stderr), pictures:
        try:
            status = main([str(path)])
        except SystemExit as stop:  # after a signal
            status = stop.code
    return status, stderr.getvalue()


def _config_path(output_dir):
    """Where the YAML of a run goes: beside its output folder, which is made; elsewhere when that cannot be."""
    output = Path(output_dir if isinstance(output_dir, str) else tempfile.mkdtemp())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError:
        output = Path(tempfile.mkdtemp()) / "run"
    return output.parent / f"{output.name}.{os.environ.get('RANK', '0')}.yaml"


def rows(config, name="metrics.jsonl"):
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(config["output_dir"]) / name).read_text().splitlines()]


def start(config, world):
    """Start a run in `world` processes forked from a server that has imported everything -> the processes."""
    context = _fork_server()
    port = free_port()
    processes = [context.Process(target=_forked, args=(rank, world, port, config)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _forked(rank, world, port, config):
    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    as_torchrun(rank, world, port)
    status, stderr = train_here(config)
    stderr_of(config, rank).write_text(stderr)
    if status:
        print(stderr)
    os._exit(status)


def stderr_of(config, rank):
    """The file into which a process of `start` writes what it printed."""
    output = Path(config["output_dir"])
    return output.parent / f"{output.name}.{rank}.err"


def finish(processes, timeout=120):
    """Wait -> exit codes."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def kill(processes):
    """SIGKILL all of them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
