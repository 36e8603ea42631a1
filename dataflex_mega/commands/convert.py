"""Convert between a Hugging Face folder and a megatron-core checkpoint, or check that the conversion is lossless.

    dataflex-cli convert check --model FOLDER [--tensor 2 --pipeline 2]
    dataflex-cli convert to-megatron --model FOLDER --output FOLDER
    dataflex-cli convert to-hf --model FOLDER --output FOLDER

Checkpoints do not depend on the layout. This command starts the processes of a layout itself; under torchrun
it uses torchrun's processes, which may be on several machines with a shared folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.exit_status import OneLineParser

SUMMARY = "convert check | to-megatron | to-hf --model FOLDER  Hugging Face folder <-> megatron-core checkpoint"
HELP_ORDER = 101


def main(argv: Sequence[str]) -> int:
    """Start the processes and convert -> 0, or 1 when a check fails. Raises UserError, that of a process too."""
    from torch.multiprocessing import ProcessRaisedException

    args = parse_arguments(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return run(args)
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]  # the traceback of a process ends with its error
        if not last.startswith("dataflex_mega.errors."):
            raise
        raise UserError(last.partition(": ")[2]) from error


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="dataflex-cli convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in {
        "check": "Hugging Face -> Megatron -> Hugging Face in memory; lists the tensors that differ",
        "to-megatron": "write a checkpoint of megatron-core (torch_dist)",
        "to-hf": "write a Hugging Face folder from such a checkpoint",
    }.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--model", type=Path, required=True, help="folder to read")
        if name != "check":
            command.add_argument("--output", type=Path, required=True, help="folder to write; must be empty or missing")
        for dimension in ("tensor", "pipeline", "expert"):
            command.add_argument(f"--{dimension}", type=int, default=1, help=f"{dimension}-parallel size (1)")
        command.add_argument("--vocab-multiple", type=int, default=1, help="pad the vocabulary to a multiple (1)")
        command.add_argument("--file-gb", type=float, default=5.0, help="largest file of weights, in GB (5)")
    return parser.parse_args(list(argv))


def build_request(args: argparse.Namespace) -> Any:
    """The conversion that the arguments describe. Raises ConfigError for sizes below 1 and for a non-empty output folder."""
    from dataflex_mega.config.megatron import MegatronArguments
    from dataflex_mega.engines.megatron.conversion import ConversionRequest
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
        sequence_parallel=args.tensor > 1,  # required for a mixture of experts under tensor parallelism
    )
    return ConversionRequest(args.model, target, keys, args.vocab_multiple, ExportOptions(int(args.file_gb * 1e9)))


def run_in_processes(function: Callable[..., Any], world_size: int, request: Any) -> Any:
    """Call `function(parallel_info, request)` in every process -> the main process's result; else None."""
    from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
    from dataflex_mega.distributed.testing import run_distributed_test

    if "RANK" not in os.environ:
        return run_distributed_test(function, world_size, request)[0]
    parallel_info = init_distributed()
    result = function(parallel_info, request)
    shutdown_distributed(orderly=True)
    return result if parallel_info.is_main else None


def run(args: argparse.Namespace) -> int:
    """Run the conversion or the check -> the exit status. Raises UserError."""
    from dataflex_mega.engines.megatron import version

    version.check()
    from dataflex_mega.engines.megatron import conversion

    request = build_request(args)
    world_size = max(args.tensor, args.expert) * args.pipeline
    conversion.plan(request, conversion.config_of(args.model), int(os.environ.get("WORLD_SIZE", str(world_size))))
    function = {"check": conversion.check, "to-megatron": conversion.to_megatron, "to-hf": conversion.to_hf}[
        args.command
    ]
    differing = run_in_processes(function, world_size, request)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.command != "check":
        print(f"written to {args.output}")
        return 0
    print(f"{len(differing)} tensors differ: {', '.join(differing)}" if differing else "all tensors are bit-equal")
    return 1 if differing else 0
