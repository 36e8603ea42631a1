"""`dataflex-cli`: train, look around, and everything that `llamafactory-cli` does besides training."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from dataflex_mega.errors import UserError, did_you_mean

HELP = """usage: dataflex-cli COMMAND [ARGUMENTS]

  train CONFIG [key=value ...]   train as a YAML or JSON file says; key=value changes a key for this run
  reference CONFIG [key=value ...]   write the token losses of reference_model, for doremi, rho_loss and rho1
  store build|score|info|verify  gradient stores for LESS; `store --help` says more
  doremi FOLDER [key=value ...]  DoReMi's three runs, FOLDER/step1.yaml .. step3.yaml, one after the other
  components [ROLE ...]          the algorithms that can be a selector, mixer, reorder or weighter, and their parameters
  compare SUITE.yaml             train methods x seeds on the same budget; perplexity, cost, report, plots
  regmix STUDY.yaml              propose proportions of the domains from many small runs
  embed SOURCE --model M --output DIR   a vector for every sample of a configuration or a JSON file
  near | tsds --candidates DIR --queries DIR   neighbours or chances from them, for the selectors of these names
  corpus INPUT ... --output DIR  text files into Megatron .bin/.idx files, one pair a domain
  env                            what this machine can run
  version                        the version of this package
  help                           this text; `train --help` says more about configurations

  export | chat | api | webchat | webui | eval   as in llamafactory-cli, to which they are handed on

examples:
  dataflex-cli train run.yaml                                  a LLaMA-Factory YAML trains as it always did
  dataflex-cli train run.yaml mixer=odm update_step=50         the same data, its proportions moved while training
  dataflex-cli train run.yaml selector.name=loss selector.focus=high update_step=100
  NPROC_PER_NODE=4 dataflex-cli train run.yaml                 four processes (several GPUs start one each by themselves)
  dataflex-cli export model_name_or_path=base adapter_name_or_path=out template=qwen export_dir=merged

Several processes are started through torchrun, by these variables: NPROC_PER_NODE, FORCE_TORCHRUN, NNODES, NODE_RANK,
MASTER_ADDR, MASTER_PORT, and for elastic runs RDZV_ID, MIN_NNODES, MAX_NNODES, MAX_RESTARTS."""

HANDED_ON = ("export", "chat", "api", "webui", "webchat", "eval")
PEER = "llamafactory-cli"
TRAIN_MODULE = "dataflex_mega.train"
STORE_MODULE = "dataflex_mega.commands.store"
REFERENCE_MODULE = "dataflex_mega.commands.reference"
OFFLINE_MODULE = "dataflex_mega.commands.offline"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 after one line on standard error for a user's mistake; 130 when interrupted; else that of what
    was run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("help", [])
    try:
        return run(command, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # what was running has heard it too, and has said what there is to say
        return 130


def run(command: str, arguments: list[str]) -> int:
    """One command. Raises UserError for one that does not exist."""
    if command in HANDED_ON:
        return hand_on(command, arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "reference": reference,
        "store": store,
        "doremi": doremi,
        "components": components,
        "embed": lambda rest: offline("embed", rest),
        "near": lambda rest: offline("near", rest),
        "tsds": lambda rest: offline("tsds", rest),
        "corpus": corpus,
        "compare": compare,
        "regmix": regmix,
        "env": env,
        "version": version,
        "help": help_,
        "--help": help_,
        "-h": help_,
        "--version": version,
    }
    if command not in commands:
        known = [name for name in (*commands, *HANDED_ON) if not name.startswith("-")]
        hint = did_you_mean(command, known) or f"; there is {', '.join(known)}"
        raise UserError(f"unknown command {command!r}{hint}")
    return commands[command](arguments)


def help_(arguments: list[str]) -> int:
    """Print how to use it."""
    print(HELP)
    return 0


def version(arguments: list[str]) -> int:
    """Print the version."""
    print(f"dataflex_mega {metadata.version('dataflex_mega')}")
    return 0


def env(arguments: list[str]) -> int:
    """Print what this machine can run."""
    from dataflex_mega import doctor

    return doctor.main(arguments)


def corpus(arguments: list[str]) -> int:
    """Text files -> a corpus."""
    from dataflex_mega.corpus import command

    return command.main(arguments)


def compare(arguments: list[str]) -> int:
    """Methods against each other."""
    from dataflex_mega.compare import command

    return command.main(arguments)


def regmix(arguments: list[str]) -> int:
    """Proportions from many small runs."""
    from dataflex_mega.compare import study

    return study.main(arguments)


# -- components --------------------------------------------------------------------------------------------------------


def components(arguments: list[str]) -> int:
    """Print the algorithms of all roles, or of the roles named."""
    from dataflex_mega.registry import CONTRACTS

    for role in arguments:
        if role not in CONTRACTS:
            raise UserError(f"components: no role {role!r}{did_you_mean(role, CONTRACTS)}; {', '.join(CONTRACTS)}")
    print("\n\n".join(describe_role(role) for role in arguments or CONTRACTS))
    return 0


def describe_role(role: str) -> str:
    """`mixer:` and, for every algorithm, its first docstring line and its parameters with type and default."""
    from dataclasses import MISSING

    from dataflex_mega.registry import all_names, load_class, parameters

    lines = [f"{role}:"]
    for name in all_names(role):
        first = (load_class(role, name).__doc__ or "").strip().splitlines()[:1]
        lines.append(f"  {name:<12} {''.join(first)}".rstrip())
        for key, parameter in parameters(role, name).items():
            default = "required" if parameter.default is MISSING else f"= {parameter.default!r}"
            lines.append(f"    {key}: {parameter.type_text} {default}")
    return "\n".join(lines)


# -- train -------------------------------------------------------------------------------------------------------------


def train(arguments: list[str]) -> int:
    """Train in this process, or start torchrun and wait for it. Returns its exit status."""
    from dataflex_mega import train as training

    asks_for_help = not arguments or arguments[0] in ("-h", "--help", "help")
    if asks_for_help or not needs_launcher(os.environ, device_count):
        return training.main(arguments)
    check(arguments)
    command = launcher(os.environ, arguments, device_count)
    print(f"starting: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    return subprocess.run(command).returncode


def reference(arguments: list[str]) -> int:
    """Write the reference losses of a configuration, in this process or under torchrun. Returns its exit status."""
    from dataflex_mega.commands import reference as reference_command

    asks_for_help = not arguments or arguments[0] in ("-h", "--help", "help")
    if asks_for_help or not needs_launcher(os.environ, device_count):
        return reference_command.main(arguments)
    check(arguments)
    return subprocess.run(launcher(os.environ, arguments, device_count, REFERENCE_MODULE)).returncode


def offline(name: str, arguments: list[str]) -> int:
    """`embed`, `near` or `tsds`, in this process or under torchrun. Returns its exit status."""
    from dataflex_mega.commands import offline as tools

    asks_for_help = not arguments or arguments[0] in ("-h", "--help")
    if asks_for_help or not needs_launcher(os.environ, device_count):
        return tools.main([name, *arguments])
    return subprocess.run(launcher(os.environ, [name, *arguments], device_count, OFFLINE_MODULE)).returncode


def store(arguments: list[str]) -> int:
    """Gradient stores; building and scoring in this process or under torchrun. Returns the exit status."""
    from dataflex_mega.commands import store as store_command

    if store_command.wants_help(arguments):
        return store_command.main(arguments)
    given = store_command.arguments_of(arguments)
    if given.command in ("info", "verify") or not needs_launcher(os.environ, device_count):
        return store_command.main(arguments)
    check([given.what, *given.overrides])
    return subprocess.run(launcher(os.environ, arguments, device_count, STORE_MODULE)).returncode


def doremi(arguments: list[str]) -> int:
    """DoReMi's three runs. Returns the exit status of the first that fails, or 0."""
    from dataflex_mega.commands import doremi as chain

    def start(given: list[str]) -> int:
        launch = needs_launcher(os.environ, device_count)
        alone = [sys.executable, "-m", TRAIN_MODULE, *given]
        return subprocess.run(launcher(os.environ, given, device_count) if launch else alone).returncode

    return chain.main(arguments, start)


def check(arguments: list[str]) -> None:
    """Find a user's mistake here, once, and not in every process. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.megatron import engine_of_environment
    from dataflex_mega.config.megatron_checks import check_megatron
    from dataflex_mega.config.parse import split
    from dataflex_mega.llamafactory import predict

    given = load(arguments[0], arguments[1:])  # before LLaMA-Factory's keys are asked for, which takes seconds
    variable = engine_of_environment(os.environ)
    from dataflex_mega.llamafactory.args import keys

    config = split(given, keys(), variable)
    if config.ours.train_type != "static" or config.engine == "megatron":
        check_dynamic(config)
        if predict.wanted(config.lf):
            predict.check(config.lf)
    if config.engine == "megatron":
        check_megatron(config)


def device_count() -> int:
    """Accelerators of this machine."""
    import torch

    return torch.accelerator.device_count()


def needs_launcher(environment: Mapping[str, str], devices: Callable[[], int]) -> bool:
    """Whether `train` has to start further processes. Not inside torchrun, and not under Ray, which starts its own."""
    if "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:
        return False
    if is_on(environment, "FORCE_TORCHRUN") or read_count(environment, "NNODES", 1) > 1:
        return True
    if "NPROC_PER_NODE" in environment:
        return processes(environment, devices) != "1"
    return not is_on(environment, "USE_RAY") and devices() > 1


def launcher(
    environment: Mapping[str, str], arguments: list[str], devices: Callable[[], int], module: str = TRAIN_MODULE
) -> list[str]:
    """The torchrun command line, from the variables that llamafactory-cli reads. Raises UserError for a bad value."""
    nodes = read_count(environment, "NNODES", 1)
    if nodes > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UserError(f"{name}: missing; with NNODES={nodes} every node must be given the same one")
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    port = read_count(environment, "MASTER_PORT", 0) or free_port()
    options = [f"--nproc_per_node={processes(environment, devices)}"]
    if "MAX_RESTARTS" in environment:
        options.append(f"--max_restarts={read_count(environment, 'MAX_RESTARTS', 0, least=0)}")
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
        rank = read_count(environment, "NODE_RANK", 0, least=0)
        if rank >= nodes:
            raise UserError(f"NODE_RANK: must be below NNODES, which is {nodes}, found {rank}")
        options += [f"--nnodes={nodes}", f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *arguments]


def elastic_nodes(environment: Mapping[str, str], nodes: int) -> str:
    """`2:4`, or the fixed number where no range is given. Raises UserError for half a range or an empty one."""
    ends = [name for name in ("MIN_NNODES", "MAX_NNODES") if name in environment]
    if not ends:
        return str(nodes)
    if len(ends) == 1:
        raise UserError(f"{ends[0]}: needs {'MAX' if ends[0].startswith('MIN') else 'MIN'}_NNODES too")
    least, most = read_count(environment, "MIN_NNODES", 1), read_count(environment, "MAX_NNODES", 1)
    if least > most:
        raise UserError(f"MIN_NNODES: must not be above MAX_NNODES, which is {most}, found {least}")
    return f"{least}:{most}"


def processes(environment: Mapping[str, str], devices: Callable[[], int]) -> str:
    """Processes on this node: NPROC_PER_NODE, a number or one of torchrun's words, else one for each accelerator."""
    given = environment.get("NPROC_PER_NODE")
    if given in ("auto", "gpu", "cpu"):
        return given
    return str(max(1, devices()) if given is None else read_count(environment, "NPROC_PER_NODE", 1))


def read_count(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """A variable that holds a number. Raises UserError for anything else."""
    given = environment.get(name)
    if given is None:
        return default
    if not given.isdecimal() or int(given) < least:
        raise UserError(f"{name}: expected a whole number >= {least}, found {given!r}")
    return int(given)


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes, as LLaMA-Factory reads it."""
    return environment.get(name, "0").lower() in ("1", "y", "true")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- the rest ----------------------------------------------------------------------------------------------------------


def hand_on(command: str, arguments: list[str]) -> int:
    """Run a command of llamafactory-cli in this process, as that program would."""
    from dataflex_mega.llamafactory.compat import ensure_importable

    ensure_importable()
    found = metadata.entry_points(group="console_scripts", name=PEER)
    if not found:
        raise UserError(f"{command}: {PEER} is not installed")
    theirs = next(iter(found)).load()
    sys.argv[:] = [PEER, command, *arguments]
    try:
        return theirs() or 0
    except NotImplementedError as error:
        raise UserError(f"{command}: {PEER} no longer does this: {error}") from error
