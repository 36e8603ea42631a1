"""Starting the processes of a command through torchrun, by the variables that llamafactory-cli reads."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping

from dataflex_mega.commands._forwarding import run_child
from dataflex_mega.errors import UserError
from dataflex_mega.log import get_logger

TORCHRUN = "dataflex_mega.distributed.torchrun"  # torchrun, without its own report of processes that failed


def is_needed() -> bool:
    """Whether a command has to start further processes here; see `needs_launcher`."""
    return needs_launcher(os.environ, device_count)


def launch(module: str, arguments: list[str], announce: bool = False) -> int:
    """Run `python -m module` in all processes and wait. `announce`: log the command first. Returns the exit status."""
    command = torchrun_command(os.environ, arguments, device_count, module)
    if announce:
        get_logger().info("starting: %s", " ".join(command[1:]))
    return run_child(command)


def check_configuration(arguments: list[str]) -> None:
    """Find a user's mistake once, before the processes start. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.environment import check_environment
    from dataflex_mega.config.load import load
    from dataflex_mega.config.megatron import engine_of_environment
    from dataflex_mega.config.megatron_checks import check_megatron
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory import predict

    check_environment(os.environ)
    keys = load(arguments[0], arguments[1:])  # before LLaMA-Factory is imported, which takes seconds
    environment = {**os.environ, "WORLD_SIZE": total_processes(os.environ, device_count)}
    variable = engine_of_environment(environment)
    from dataflex_mega.llamafactory.args import argument_types

    config = parse_config(keys, argument_types(), variable, environment)
    if config.dataflex.train_type != "static" or config.engine == "megatron":
        check_dynamic(config)
        if predict.is_requested(config.llamafactory):
            predict.check(config.llamafactory)
    if config.engine == "megatron":
        check_megatron(config)


def device_count() -> int:
    """Accelerators of this machine."""
    import torch

    return torch.accelerator.device_count()


def needs_launcher(environment: Mapping[str, str], devices: Callable[[], int]) -> bool:
    """Whether a command has to start further processes. Not inside torchrun, and not under Ray, which starts its own."""
    if "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:
        return False
    if is_on(environment, "FORCE_TORCHRUN") or read_count(environment, "NNODES", 1) > 1:
        return True
    if "NPROC_PER_NODE" in environment:
        return num_processes(environment, devices) != "1"
    return not is_on(environment, "USE_RAY") and devices() > 1


def torchrun_command(
    environment: Mapping[str, str], arguments: list[str], devices: Callable[[], int], module: str
) -> list[str]:
    """The torchrun command line, from the variables that llamafactory-cli reads. Raises UserError for a bad value."""
    nodes = read_count(environment, "NNODES", 1)
    if nodes > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UserError(f"{name}: missing; with NNODES={nodes} every node must be given the same one")
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    port = read_count(environment, "MASTER_PORT", 0) or free_port()
    options = [f"--nproc_per_node={num_processes(environment, devices)}"]
    if "MAX_RESTARTS" in environment:
        options.append(f"--max_restarts={read_count(environment, 'MAX_RESTARTS', 0, minimum=0)}")
    if "RDZV_ID" in environment:
        options += [
            f"--nnodes={elastic_nodes(environment, nodes)}",
            f"--rdzv_id={environment['RDZV_ID']}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={address}:{port}",
        ]
    else:
        for name in ("MIN_NNODES", "MAX_NNODES"):
            if name in environment:
                raise UserError(f"{name}: has no effect without RDZV_ID, which names an elastic run")
        rank = read_count(environment, "NODE_RANK", 0, minimum=0)
        if rank >= nodes:
            raise UserError(f"NODE_RANK: must be below NNODES, which is {nodes}, found {rank}")
        options += [f"--nnodes={nodes}", f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={port}"]
    return [sys.executable, "-m", TORCHRUN, *options, "-m", module, *arguments]


def elastic_nodes(environment: Mapping[str, str], nodes: int) -> str:
    """`2:4`, or the fixed number where no range is given. Raises UserError for half a range or an empty one."""
    ends = [name for name in ("MIN_NNODES", "MAX_NNODES") if name in environment]
    if not ends:
        return str(nodes)
    if len(ends) == 1:
        raise UserError(f"{ends[0]}: needs {'MAX' if ends[0].startswith('MIN') else 'MIN'}_NNODES too")
    minimum, maximum = read_count(environment, "MIN_NNODES", 1), read_count(environment, "MAX_NNODES", 1)
    if minimum > maximum:
        raise UserError(f"MIN_NNODES: must not be above MAX_NNODES, which is {maximum}, found {minimum}")
    return f"{minimum}:{maximum}"


def num_processes(environment: Mapping[str, str], devices: Callable[[], int]) -> str:
    """Processes on this node: NPROC_PER_NODE, a number or one of torchrun's words, else one for each accelerator."""
    value = environment.get("NPROC_PER_NODE")
    if value in ("auto", "gpu", "cpu"):
        return value
    return str(max(1, devices()) if value is None else read_count(environment, "NPROC_PER_NODE", 1))


def total_processes(environment: Mapping[str, str], devices: Callable[[], int]) -> str:
    """Processes on all nodes, what torchrun will put into WORLD_SIZE; a word where only torchrun knows."""
    processes = num_processes(environment, devices)
    return str(int(processes) * read_count(environment, "NNODES", 1)) if processes.isdecimal() else processes


def read_count(environment: Mapping[str, str], name: str, default: int, minimum: int = 1) -> int:
    """A variable that holds a number. Raises UserError for anything else."""
    value = environment.get(name)
    if value is None:
        return default
    if not value.isdecimal() or int(value) < minimum:
        raise UserError(f"{name}: expected a whole number >= {minimum}, found {value!r}")
    return int(value)


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes, as LLaMA-Factory reads it."""
    return environment.get(name, "0").lower() in ("1", "y", "true")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
