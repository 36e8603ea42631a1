"""What tools/same_numbers.py runs: every YAML below examples/, cut to size by command-line overrides, as lists of tasks.

A task is `python -m MODULE ARGV...` or `python SCRIPT ARGV...`, in each of the job's processes. Paths in outputs are
relative to the job's folder, so both sides are given the same words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TRAIN, CLI = "dataflex_mega.train", "dataflex_mega.cli"
OUT = "out"
LENGTH, BATCH, EVAL_BATCH = 30, 3, 5  # sums and means of powers of two would hide another order of operations
STEPS, SELECTION_STEPS, PIPELINE_STEPS = 8, 4, 24  # fewer where every update scores the whole pool
ORDERED_STEPS = 3  # between updates of an order
NUM_COMPONENT_ROWS = 24
# Key of an example -> its value here. A key that an example does not have stays away.
SIZES: dict[str, Any] = {
    "warmup_step": 1, "update_step": 1, "eval_steps": 2, "warmup_steps": 1, "save_total_limit": None,
    "per_device_eval_batch_size": EVAL_BATCH, "plot_loss": False,
}  # fmt: skip
SMALL_COMPONENT = {"cutoff_len": LENGTH, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
TENSOR_PARALLEL = {"engine": "megatron", "tensor_model_parallel_size": 2, "sequence_parallel": True}
ADO = {"name": "ado", "start_step": 2, "refit_every": 1, "ignore_steps": 0}
PLUGINS = "examples.plugins.my_algorithms"
# Variants: (example, overrides) for algorithms and options that no example has.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("demo.yaml", {"mixer": "doge"}),
    ("demo.yaml", {"mixer": {"name": "doge", "against": "eval"}}),
    ("demo.yaml", {"mixer": ADO}),
    ("demo.yaml", {"mixer": {**ADO, "credit": "spread", "count": "own"}}),
    ("demo.yaml", {"mixer": "group_dro"}),
    ("demo.yaml", {"mixer": {"name": "group_dro", "act_on": "sampling"}}),
    ("demo.yaml", {"mixer": {"name": "odm", "variant": "exp3", "importance": "proportion"}}),
    ("demo.yaml", {"mixer": {"name": "odm", "variant": "smoothed_mean"}, "min_proportion": 0.1}),
    ("demo.yaml", {"mixer": {"name": "odm", "variant": "group"}, "max_epochs": 1}),
    ("demo.yaml", {"mixer": {"name": f"{PLUGINS}:Curriculum", "final": [1, 1, 1, 5], "tokens": 500}}),
    ("mixing/dynamic_moe.yaml", {"mixer.similarity": "cos", "mixer.layers": "all"}),
    ("doremi/step2.yaml", {"mixer.loss_norm": "per_domain", "mixer.average": "with_initial"}),
    ("select.yaml", {"selector": "delta_loss"}),
    ("select.yaml", {"selector": {"name": "random", "replacement": True}}),
    ("select.yaml", {"selector": {"name": f"{PLUGINS}:MiddleLoss", "quantile": 0.4}}),
    ("select.yaml", {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}),
    ("select.yaml", {"candidates": 0.5, "rescore": "incremental", "finetuning_type": "full"}),
    ("less.yaml", {"selector.gradient_type": "sgd", "candidates": 0.5, "rescore": "incremental"}),
    ("less_store.yaml", {"selector.projection": "dense", "selector.proj_dim": 64}),
    ("less_store.yaml", {"selector.gradient_type": "sgd", "selector.checkpoints": 2}),
    ("icons.yaml", {"selector.gradient_type": "sgd"}),
    ("cluster_less.yaml", {"selector.clustering_method": "spherical_kmeans", "selector.combine": "direction"}),
    ("cluster_less.yaml", {"selector.clustering_method": "random", "selector.representative_strategy": "mixed"}),
    ("nice.yaml", {"selector.baseline": "mean", "selector.reward": "number"}),
    ("coincide.yaml", {"selector.num_clusters": 3, "selector.embedding_layers": [0, -1]}),
    ("weight.yaml", {"weighter": {"name": "loss", "strategy": "uniform"}}),
    ("weight.yaml", {"weighter": {"name": "loss", "strategy": "quadratic"}, "lookahead": "micro"}),
    ("weight.yaml", {"weighter": {"name": "loss", "strategy": "extremes"}}),
    ("weight.yaml", {"weighter": "focal"}),
    ("weight.yaml", {"weighter": f"{PLUGINS}:Clipped"}),
    ("weight_by_likeness.yaml", {"weighter": "adapt"}),
    ("weight_by_likeness.yaml", {"weighter.pooling": "mean_pool", "weighter.fixed_point_iters": 3}),
    ("weight_by_likeness.yaml", {"weighter.objective_mode": "diverse_only", "lookahead": "micro"}),
    ("greats.yaml", {"weighter.gradient_type": "adam", "weighter.curvature": 0.5}),
    ("all_roles.yaml", {"bf16": True}),
]  # fmt: skip
# These are trained for half of their steps, and then again from the checkpoint.
RESUMED = (
    "all_roles.yaml", "cluster_less.yaml", "demo.yaml", "doremi/step2.yaml", "less.yaml", "less_store.yaml",
    "megatron/weight_dp2.yaml", "pipeline.yaml", "reorder.yaml", "select.yaml", "weight_by_likeness.yaml",
)  # fmt: skip
# Example of a train type of DataFlex -> the components it stands for.
COMPONENTS = {
    "dataflex/select.yaml": "less cluster_less nice icons coincide loss delta_loss tsds near random custom",
    "dataflex/mix.yaml": "dynamic_moe static random odm doremi",
    "dataflex/reorder.yaml": "sorting shuffle segment folding zigzag stair saw dynamic_saw dynamic_folding "
    "reuse_selector_scores",
    "dataflex/weight.yaml": "loss adapt joint_update_aware custom",
    "dataflex/lego.yaml": "hierarchical select_then_reorder mix_then_weight select_only",
}


@dataclass(frozen=True)
class Job:
    """One line of the table: tasks that run one after the other in one folder."""

    name: str
    processes: int
    tasks: list[dict[str, Any]]
    note: str = ""  # what is not as in the example, besides sizes
    examples: list[str] = field(default_factory=list)  # files below examples/ that it runs

    @property
    def folder_name(self) -> str:
        """A file name that tells jobs apart."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.name).strip("_")[:120] + f"-{self.processes}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@cache
def read_yaml(path: Path) -> dict[str, Any]:
    """A file's keys, to be read only."""
    return yaml.safe_load(path.read_text())


@dataclass(frozen=True)
class Inputs:
    """The folder that side_by_side/inputs.py has written."""

    folder: Path

    def path(self, *parts: str) -> str:
        """Of a file in it."""
        return str(self.folder.joinpath(*parts))

    def config(self, example: str) -> dict[str, Any]:
        """The keys of an example."""
        return read_yaml(self.folder / "examples" / example)

    def examples(self) -> list[str]:
        """Every YAML below examples/, relative to it."""
        root = self.folder / "examples"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))


def overrides(keys: dict[str, Any]) -> list[str]:
    """`key=value` words; None becomes null."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def shortened(value: str) -> str:
    """The same words without spaces and quotes, for a name."""
    return value.replace('"', "").replace(f"{PLUGINS}:", "").replace(": ", ":").replace(", ", ",")


def steps_of(config: dict[str, Any]) -> int:
    """How many steps a configuration is cut to."""
    if "pipeline" in config:
        return PIPELINE_STEPS
    selects = "selector" in config or config.get("train_type") == "dynamic_select"
    return SELECTION_STEPS if selects else STEPS


def cut(inputs: Inputs, example: str, output: str = OUT) -> dict[str, Any]:
    """Keys that make an example small: paths of the inputs, few steps, short samples."""
    config = inputs.config(example)
    keys = {key: value for key, value in SIZES.items() if key in config}
    model = "moe" if str(config["model_name_or_path"]).endswith("moe") else "model"
    keys.update(
        model_name_or_path=inputs.path(model), output_dir=output, cutoff_len=LENGTH, max_steps=steps_of(config),
        logging_steps=1, per_device_train_batch_size=BATCH, save_strategy="no",
    )  # fmt: skip
    if config.get("train_type") == "dynamic_reorder":
        keys["update_step"] = ORDERED_STEPS
    if int(config.get("update_times", -1)) > 0:
        keys["update_times"] = (keys["max_steps"] - 1) // keys["update_step"]
    if "train_step" in config:
        keys["train_step"] = keys["max_steps"]
    if "dataset_dir" in config:
        keys["dataset_dir"] = inputs.path("data")
        if config["stage"] == "pt":
            keys["max_samples"] = 4 if "selector" in config else 12
    if "reference_model" in config:
        keys["reference_model"] = inputs.path("reference")
    if "components_cfg_file" in config:
        keys["components_cfg_file"] = inputs.path(config["components_cfg_file"])
    return {**keys, **corpus_keys(inputs, config)}


def corpus_keys(inputs: Inputs, config: dict[str, Any]) -> dict[str, Any]:
    """Where a configuration reads .bin/.idx files and proportions from, and fewer micro-batches of seven domains."""
    keys: dict[str, Any] = {}
    seven = "RedPajama" in str(config.get("dataset"))
    for key in ("corpus_dir", "eval_corpus_dir"):
        if key in config:
            name = "slimpajama" if seven else "corpus_validation" if key.startswith("eval") else "corpus"
            keys[key] = inputs.path(name)
    if seven:
        keys["gradient_accumulation_steps"] = min(2, int(config.get("gradient_accumulation_steps", 1)))
        if "eval_corpus_dir" in config:
            keys["eval_dataset"] = "RedPajamaBook,RedPajamaC4"
        if str(config.get("init_mixture_proportions_file")).endswith("manifest.json"):
            keys["init_mixture_proportions_file"] = inputs.path("slimpajama", "manifest.json")
    return keys


def train(inputs: Inputs, example: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The task that trains an example."""
    return {"module": TRAIN, "argv": [inputs.path("examples", example), *overrides(keys)]}


def cli(*argv: str) -> dict[str, Any]:
    """The task that runs a command of `dataflex-cli`, in one process."""
    return {"module": CLI, "argv": list(argv), "processes": 1}


# -- jobs --------------------------------------------------------------------------------------------------------------


def plain_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """Examples that are one training and need nothing but the inputs, on one and on two processes."""
    for example in inputs.examples():
        folder = example.partition("/")[0]
        if folder in ("compare", "dataflex", "doremi", "offline") or example == "slimpajama/compare.yaml":
            continue
        if folder == "megatron" or "/doremi_" in example:
            continue
        yield Job(example, processes, [train(inputs, example, cut(inputs, example))], examples=[example])


def megatron_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """Examples of the Megatron engine on their own layouts; one for four processes also in halves of its layout."""
    four = "megatron/pretrain_odm_tp2_pp2.yaml"
    for example in [name for name in inputs.examples() if name.startswith("megatron/")]:
        config, keys, note = inputs.config(example), cut(inputs, example), ""
        if "slimpajama" in example:
            note = "64 GPUs in the example"
        sizes = [int(value) for key, value in config.items() if key.endswith("_parallel_size")]
        needed = 4 if example == four else 2 if sizes or "weight_dp2" in example else min(processes, 2)
        if needed == processes:
            yield Job(example, processes, [train(inputs, example, keys)], note, [example])
    if processes == 2 and four in inputs.examples():
        for halved in (
            {"pipeline_model_parallel_size": 1},
            {"tensor_model_parallel_size": 1, "sequence_parallel": False},
        ):
            task = train(inputs, four, {**cut(inputs, four), **halved})
            yield Job(f"{four} {' '.join(overrides(halved))}", 2, [task], "4 processes in the example", [four])


def doremi_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """DoReMi's three runs, each reading what the one before it wrote."""
    for folder in sorted({name.rpartition("/")[0] for name in inputs.examples() if name.endswith("/step1.yaml")}):
        files = [f"{folder}/step{number}.yaml" for number in (1, 2, 3)]
        handed = (
            {},
            {"reference_model": f"{OUT}/step1"},
            {"init_mixture_proportions_file": f"{OUT}/step2/doremi_average_weights.json"},
        )
        tasks = [
            train(inputs, file, {**cut(inputs, file, f"{OUT}/step{number}"), **more})
            for number, (file, more) in enumerate(zip(files, handed, strict=True), 1)
        ]
        yield Job(f"{folder}/step1-3.yaml", processes, tasks, examples=files)


def offline_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """`dataflex-cli embed`, `near` and `tsds` with the trainings that read their files."""
    near, tsds = "offline/near.yaml", "offline/tsds.yaml"
    if near not in inputs.examples():
        return
    path, keys = inputs.path("examples", near), {**cut(inputs, near), "selector.indices_path": f"{OUT}/near.npy"}
    model = ["--encoder", "model", "--model", inputs.path("model")]
    sides = ["--candidates", f"{OUT}/embeddings/train", "--queries", f"{OUT}/embeddings/eval"]
    tasks: list[dict[str, Any]] = [
        cli("embed", path, *overrides(keys), *model, "--output", f"{OUT}/embeddings/train"),
        cli("embed", path, *overrides(keys), *model, "--output", f"{OUT}/embeddings/eval", "--part", "eval"),
        cli("near", *sides, "--output", f"{OUT}/near.npy", "--k", "8"),
        cli("tsds", *sides, "--output", f"{OUT}/tsds.npy", "--k", "20", "--kde-k", "10"),
    ]
    for task in tasks:
        task["processes"] = processes
    more = {"output_dir": f"{OUT}/tsds", "selector.probs_path": f"{OUT}/tsds.npy"}
    tasks += [
        train(inputs, near, {**keys, "output_dir": f"{OUT}/near"}),
        train(inputs, tsds, {**cut(inputs, tsds), **more}),
    ]
    yield Job("offline/near.yaml, offline/tsds.yaml", processes, tasks, examples=[near, tsds])


def compare_jobs(inputs: Inputs) -> Iterator[Job]:
    """Suites of `dataflex-cli compare`: the trainings that it prints, and then its measurements."""
    for example in ("compare/suite.yaml", "slimpajama/compare.yaml"):
        if example not in inputs.examples():
            continue
        base = inputs.config(example)["base"]
        sizes = {key: value for key, value in SIZES.items() if key in base}
        more = {
            "model_name_or_path": inputs.path("model"), "cutoff_len": LENGTH, "max_steps": STEPS, "logging_steps": 1,
            "per_device_train_batch_size": BATCH, "save_strategy": '"no"',
        }  # fmt: skip
        if "dataset_dir" in base:
            more.update(dataset_dir=inputs.path("data"), max_samples=12)
        keys = {f"base.{key}": value for key, value in {**sizes, **more, **corpus_keys(inputs, base)}.items()}
        keys["methods.ado.mixer"] = ADO
        for name, method in inputs.config(example)["methods"].items():  # so short a run would see none of their updates
            for key in ("warmup_step", "update_step"):
                if key in method:
                    keys[f"methods.{name}.{key}"] = 1
        words = ["compare", inputs.path("examples", example), *overrides({**keys, "seeds": [1], "output_dir": OUT})]
        tasks = [cli(*words, "launch=print"), {"lines": f"{OUT}/launch.sh"}, cli(*words, "--collect")]
        yield Job(example, 1, tasks, examples=[example])


def component_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """Every component of DataFlex: FSDP on one process, Megatron with tensor parallelism on two."""
    files = {
        "nice": {"selector": {"mc_samples": 2, "max_new_tokens": 4}},
        "near": {"selector": {"indices_path": inputs.path("near.npy")}},
        "tsds": {"selector": {"probs_path": inputs.path("tsds.npy")}},
        "dynamic_moe": {"model_name_or_path": inputs.path("moe")},
        "doremi": {"reference_model": inputs.path("reference")},
        "reuse_selector_scores": {"reorder": {"score_params": {"cache_path": inputs.path("step_10.json")}}},
    }
    present = inputs.examples()
    for example, name in [(e, name) for e, names in COMPONENTS.items() if e in present for name in names.split()]:
        keys = {**cut(inputs, example), **SMALL_COMPONENT, "component_name": name, "max_samples": NUM_COMPONENT_ROWS}
        keys = {key: value for key, value in keys.items() if key != "max_steps"}
        keys["num_train_epochs"] = 1.0
        if processes == 2:
            keys.update(TENSOR_PARALLEL)
            if name == "coincide":  # the other layers are on other pipeline stages
                keys["selector"] = {"embedding_layers": [-1]}
        task = train(inputs, example, {**keys, **files.get(name, {})})
        note = "engine: megatron, tensor parallel" if processes == 2 else ""
        yield Job(f"{example} component_name={name}", processes, [task], note, [example])


def variant_jobs(inputs: Inputs) -> Iterator[Job]:
    """Options that no example has; runs that continue from a checkpoint."""
    for example, changes in VARIANTS:
        if example in inputs.examples():
            task = train(inputs, example, {**cut(inputs, example), **changes})
            yield Job(f"{example} {shortened(' '.join(overrides(changes)))}", 1, [task], "a variant", [example])


def resumed_jobs(inputs: Inputs, processes: int) -> Iterator[Job]:
    """Runs that continue from a checkpoint after half of their steps."""
    for example in [name for name in RESUMED if name in inputs.examples()]:
        if example.startswith("megatron/") != (processes == 2):
            continue
        keys = cut(inputs, example)
        half = keys["max_steps"] // 2
        keys.update(save_strategy="steps", save_steps=half)
        tasks = [train(inputs, example, {**keys, "max_steps": half}), train(inputs, example, keys)]
        yield Job(f"{example} resumed", processes, tasks, f"stopped at step {half}", [example])


def command_jobs(inputs: Inputs) -> Iterator[Job]:
    """Commands and tools whose outputs are numbers."""
    data = inputs.path("data")
    domains = "demo_c4,demo_wiki,demo_alpaca_text,demo_python"
    tokenizer = ["--tokenizer", inputs.path("model")]
    corpus = cli("corpus", "--dataset", domains, "--dataset-dir", data, *tokenizer, "--output", f"{OUT}/corpus")
    shape = "--hidden 32 --layers 2 --heads 4 --kv-heads 2 --vocab 512 --experts 4".split()
    model = {"script": "tools/tiny_model.py", "argv": ["--data", data, *shape, "--output", f"{OUT}/model"]}
    yield Job("dataflex-cli corpus, tools/tiny_model.py", 1, [corpus, model])
    for example in ("rho1.yaml", "doremi/step2.yaml"):
        words = overrides(cut(inputs, example))
        yield Job(f"dataflex-cli reference {example}", 1, [cli("reference", inputs.path("examples", example), *words)])
    store, keys = "less_store.yaml", {**cut(inputs, "less_store.yaml"), "selector.side": 8}
    words = [inputs.path("examples", store), "--folder", f"{OUT}/store", *overrides(keys)]
    tasks = [cli("store", "build", *words), cli("store", "score", *words, "--output", f"{OUT}/scores.npy")]
    yield Job("dataflex-cli store build, score", 1, tasks, examples=[store])


def all_jobs(inputs: Inputs, processes: list[int]) -> list[Job]:
    """Those of one process first."""
    jobs: list[Job] = []
    for count in sorted(processes):
        if count in (1, 2):
            for make in (plain_jobs, doremi_jobs, offline_jobs, resumed_jobs, component_jobs):
                jobs += make(inputs, count)
        jobs += megatron_jobs(inputs, count)
        if count == 1:
            jobs += [*compare_jobs(inputs), *variant_jobs(inputs), *command_jobs(inputs)]
    return jobs
