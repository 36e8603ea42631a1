"""Convert between a Hugging Face folder and a distributed checkpoint of megatron-core, or check that nothing is lost.

    python tools/convert.py check --model FOLDER [--tensor 2 --pipeline 2]
    python tools/convert.py to-megatron --model FOLDER --output FOLDER
    python tools/convert.py to-hf --model FOLDER --output FOLDER

Checkpoints do not depend on the layout. A layout spreads the model over processes, which this command starts itself; under
torchrun it uses those of torchrun, which may be on several machines with a shared folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.multiprocessing import ProcessRaisedException

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.errors import ConfigError, UserError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in {
        "check": "Hugging Face -> Megatron -> Hugging Face in memory; says which tensors differ",
        "to-megatron": "write a checkpoint of megatron-core (torch_dist)",
        "to-hf": "write a Hugging Face folder from such a checkpoint",
    }.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--model", type=Path, required=True, help="folder to read")
        if name != "check":
            command.add_argument("--output", type=Path, required=True, help="folder to write; empty or not there")
        for dimension in ("tensor", "pipeline", "expert"):
            command.add_argument(f"--{dimension}", type=int, default=1, help=f"{dimension}-parallel size (1)")
        command.add_argument("--vocab-multiple", type=int, default=1, help="pad the vocabulary to a multiple (1)")
        command.add_argument("--file-gb", type=float, default=5.0, help="largest file of weights, in GB (5)")
    return parser.parse_args(argv)


def request_of(args: argparse.Namespace) -> Any:
    """What the command line asks for. Raises ConfigError for sizes below 1 and an output that has something in it."""
    from dataflex_mega.engines.megatron.conversion import Request
    from dataflex_mega.engines.megatron.export import ExportOptions

    for name in ("tensor", "pipeline", "expert", "vocab_multiple", "file_gb"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    target = getattr(args, "output", args.model)
    if args.command != "check" and target.exists() and any(target.iterdir()):
        raise ConfigError(f"--output {target}: not empty")
    keys = MegatronArguments(
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        expert_model_parallel_size=args.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=args.tensor > 1,  # a mixture of experts under tensor parallelism needs it
    )
    return Request(args.model, target, keys, args.vocab_multiple, ExportOptions(int(args.file_gb * 1e9)))


def in_processes(function: Callable[..., Any], world: int, request: Any) -> Any:
    """Call `function(mesh, request)` in every process -> what the main one returns; None on others of torchrun."""
    from dataflex_mega.distributed import mesh
    from dataflex_mega.distributed.testing import run_processes

    if "RANK" not in os.environ:
        return run_processes(function, world, request)[0]
    joined = mesh.start()
    result = function(joined, request)
    mesh.stop(orderly=True)
    return result if joined.is_main else None


def run(args: argparse.Namespace) -> int:
    """Do it -> the exit status. Raises UserError."""
    from dataflex_mega.engines.megatron import conversion as offline

    request = request_of(args)
    world = max(args.tensor, args.expert) * args.pipeline
    offline.plan(request, offline.config_of(args.model), int(os.environ.get("WORLD_SIZE", str(world))))
    function = {"check": offline.check, "to-megatron": offline.to_megatron, "to-hf": offline.to_hf}[args.command]
    differing = in_processes(function, world, request)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.command != "check":
        print(f"written to {args.output}")
        return 0
    print(f"{len(differing)} tensors differ: {', '.join(differing)}" if differing else "all tensors are bit-equal")
    return 1 if differing else 0


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, 1 when a check fails, or 2 after one line that says what is wrong."""
    args = parse(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return run(args)
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]  # the traceback of a process ends with its error
        if not last.startswith("dataflex_mega.errors."):
            raise
        print(f"convert: {last.partition(': ')[2]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
