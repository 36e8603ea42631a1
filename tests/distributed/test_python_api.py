"""dm.less_scores, dm.train and the sampler inside the Hugging Face Trainer, each against an independent computation."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dataflex_mega as dm
from tests.support import corpus, runs

ODM = {"mixer": "odm", "warmup_step": 2, "update_step": 2, "update_times": -1, "max_steps": 8, "save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("python"))


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder / "model")


# -- LESS --------------------------------------------------------------------------------------------------------------


def scores_here(config):
    """Scores of one process of several, by path in `config`."""
    folder = Path(config["folder"])
    model, tokenizer = load(folder)
    train, targets = (
        rows_of(folder, "code")[:9],
        {"t": rows_of(folder, "prose")[:5], "u": rows_of(folder, "code")[9:12]},
    )
    return dm.less_scores(model, tokenizer, train, targets, batch_size=2, max_length=24).tolist()


def gradient(model, row):
    """The gradient of the mean token loss of one row, of all linear layers but the output layer's copy, flattened."""
    ids = torch.from_numpy(row["input_ids"]).unsqueeze(0)
    model.zero_grad()
    model(input_ids=ids, labels=torch.from_numpy(row["labels"]).unsqueeze(0)).loss.backward()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return torch.cat([m.weight.grad.flatten() for m in linears]).double()


def test_scores_are_mean_cosines_of_gradients_and_equal_on_every_process(folder):
    found = runs.train_many(1, [{"folder": str(folder)}], run=scores_here, plain=True)[0]
    model, tokenizer = load(folder)
    tied = model.config.tie_word_embeddings
    train = dm.tokenize(rows_of(folder, "code")[:9], tokenizer, max_length=24)
    sets = [rows_of(folder, "prose")[:5], rows_of(folder, "code")[9:12]]
    unit = torch.nn.functional.normalize
    targets = [
        torch.stack([unit(gradient(model, row), dim=0) for row in dm.tokenize(one, tokenizer, max_length=24)]).mean(0)
        for one in sets
    ]
    expected = [max(float(unit(gradient(model, row), dim=0) @ target) for target in targets) for row in train]
    assert not tied, "the test model has an output layer of its own"
    assert found == pytest.approx(expected, abs=2e-5)
    assert runs.train_many(2, [{"folder": str(folder)}], run=scores_here)[0] == pytest.approx(found, abs=1e-6)


def test_the_model_is_left_as_it_was_and_its_optimizer_counts(folder):
    joined_before = torch.distributed.is_initialized()
    model, tokenizer = load(folder)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = dm.tokenize(rows_of(folder, "code")[:6], tokenizer, max_length=24)
    ids = torch.from_numpy(rows[0]["input_ids"]).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    plain = dm.less_scores(model, tokenizer, rows[:4], rows[4:])
    with_moments = dm.less_scores(model, tokenizer, rows[:4], rows[4:], optimizer=optimizer)
    assert not torch.allclose(plain, with_moments, atol=1e-3)
    assert not model.training
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert torch.distributed.is_initialized() == joined_before


def test_texts_are_scored_as_rows_with_a_text(folder):
    model, tokenizer = load(folder)
    rows = rows_of(folder, "code")[:6]
    texts = [row["text"] for row in rows]
    scores = dm.less_scores(model, tokenizer, texts[:4], texts[4:], max_length=24)
    assert torch.equal(scores, dm.less_scores(model, tokenizer, rows[:4], rows[4:], max_length=24))


def test_rows_that_cannot_be_scored_are_named(folder):
    model, tokenizer = load(folder)
    with pytest.raises(dm.DataError, match="row 0: no column 'text'; there is body"):
        dm.less_scores(model, tokenizer, [{"body": "x"}], [{"text": "y"}])
    with pytest.raises(dm.ConfigError, match="gradient_type: adam needs"):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        dm.less_scores(model, tokenizer, [{"text": "x y"}], [{"text": "y z"}], optimizer=sgd)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Alternating(dm.Mixer):
    """Lifts one domain after another."""

    lift: float = 3.0

    def setup(self, domains):
        self._count = len(domains)

    def proportions(self, context, rng):
        weights = torch.ones(self._count, dtype=torch.float64)
        weights[context.update_index % self._count] = self.lift
        return weights / weights.sum()


def train_from_python(config):
    """Rows, proportions and files of a training by dm.train."""
    folder, keys = config.pop("folder"), config.pop("call", {})
    instances = {"mixer": Alternating(5.0)} if config.pop("own", False) else {}
    before = set(Path(folder).rglob("*"))
    result = dm.train(config, **instances, **keys)
    written = {path for path in set(Path(folder).rglob("*")) - before if path.is_file()}
    model = type(result.model).__name__
    return result.metrics, result.final_proportions, [str(path) for path in written], model


def test_it_trains_as_the_command_does_and_writes_nothing(folder):
    command = runs.base(folder, **ODM, output_dir=str(folder / "out" / "command"))
    status, heard = runs.train_many(1, [command], plain=True)[0]
    assert status == 0, heard
    python = {**runs.base(folder, **ODM, output_dir=str(folder / "out" / "python")), "folder": str(folder)}
    for world in (1, 2):
        batch = {"per_device_train_batch_size": 8 // world}
        metrics, proportions, written, model = runs.train_many(
            world, [{**python, **batch}], run=train_from_python, plain=world == 1
        )[0]
        rows = runs.rows(command)
        assert [row["drawn"] for row in metrics] == [row["drawn"] for row in rows]
        assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
        if world == 1:
            assert metrics == rows
        assert written == [] and model == "LlamaForCausalLM"
        assert sum(proportions.values()) == pytest.approx(1)


@pytest.mark.parametrize("world", [1, 2])
def test_an_algorithm_of_ones_own_is_taken_as_an_instance(folder, world):
    output = str(folder / "out" / f"own{world}")
    config = runs.base(folder, update_step=2, update_times=-1, max_steps=6, output_dir=output)
    call = {"own": True, "folder": str(folder), "per_device_train_batch_size": 8 // world}
    result = runs.train_many(world, [{**config, **call}], run=train_from_python, plain=world == 1)[0]
    metrics, proportions, _, _ = result
    assert proportions == pytest.approx({"code": 1 / 7, "prose": 1 / 7, "tables": 5 / 7})
    assert len(metrics) == 6


def train_checked(config):
    """Rows of a training from a configuration that is checked already."""
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types

    return dm.train(parse_config(config, argument_types())).metrics, dm.train(config).metrics


def test_a_checked_configuration_trains_as_its_keys_do(folder):
    config = runs.base(folder, **ODM, output_dir=str(folder / "out" / "checked"))
    checked, keys = runs.train_many(1, [config], run=train_checked, plain=True)[0]
    assert checked == keys and len(keys) == ODM["max_steps"]


def test_files_are_written_when_they_are_wanted(folder):
    output = folder / "out" / "files"
    config = runs.base(folder, **ODM, output_dir=str(output))
    config = {**config, "folder": str(folder), "call": {"files": True}}
    metrics, _, written, _ = runs.train_many(1, [config], run=train_from_python, plain=True)[0]
    names = {str(Path(path).relative_to(output)) for path in written}
    assert {"metrics.jsonl", "model.safetensors", "odm_weights.jsonl", "domain_loss.png"} <= names
    assert runs.rows({"output_dir": str(output)}) == metrics


def test_mistakes_are_one_line(folder):
    with pytest.raises(dm.ConfigError, match="mixer: no mixer is called 'odn'"):
        dm.train(runs.base(folder, output_dir=None), mixer="odn", update_step=1)
    with pytest.raises(dm.ConfigError, match="give a selector, mixer, reorder or weighter"):
        dm.train(runs.base(folder, output_dir=None))


# -- the Hugging Face Trainer ------------------------------------------------------------------------------------------


def hf_training(config):
    """The draws of a Trainer on the data of a run, by step; `stop` ends it after so many steps, `resume` goes on."""
    from datasets import Dataset
    from transformers import TrainingArguments, default_data_collator, set_seed

    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import prepare

    keys = dict(config)
    stop, resume, output = keys.pop("stop"), keys.pop("resume"), keys.pop("hf_output")
    run = prepare(parse_config(keys, argument_types()))
    pool, info = run.data.pool, run.session.parallel_info
    samples = [pool.fetch(torch.arange(i, i + 1).numpy())[0] for i in range(len(pool))]
    data = Dataset.from_list([{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples])
    mixture = dm.MixtureBatchSampler(
        dict(zip(pool.names, pool.sizes, strict=True)), 8, run.session.data_seed, mixer="odm", update_every=2,
        warmup_steps=2, total_steps=8, dp_rank=info.dp_rank, dp_size=info.dp_size,
    )  # fmt: skip
    set_seed(3)
    training = TrainingArguments(
        output, per_device_train_batch_size=8 // info.dp_size, max_steps=8, learning_rate=1e-2, weight_decay=0.0,
        lr_scheduler_type="linear", save_steps=1, logging_steps=1, report_to=[], use_cpu=True, seed=3,
        ignore_data_skip=True, disable_tqdm=True,
    )  # fmt: skip
    draws, model = [], load(Path(keys["model_name_or_path"]).parent)[0]

    class Watch(dm.integrations.MixtureTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            ids = torch.cat([torch.from_numpy(i) for i in mixture.step_indices(self.state.global_step)])
            draws.append(mixture.domain_ids(ids).bincount(minlength=len(pool.sizes)).tolist())
            return super().training_step(*args, **kwargs)

    trainer = Watch(model, training, train_dataset=data, data_collator=default_data_collator, mixture=mixture)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    return draws, [log["loss"] for log in trainer.state.log_history if "loss" in log]


# The Trainer divides by the tokens of a row before labels are shifted: 32 of them, of which 31 have a loss.
COUNTED = 31 / 32


def test_the_trainer_of_hugging_face_draws_what_our_loop_draws_killed_and_resumed(folder):
    own = runs.base(folder, **ODM, output_dir=str(folder / "out" / "own1"))
    status, heard = runs.train_many(1, [own], plain=True)[0]
    assert status == 0, heard
    output = str(folder / "out" / "hf1")
    keys = {**own, "output_dir": str(folder / "out" / "unused1"), "hf_output": output}
    killed, resumed = {"stop": 5, "resume": None}, {"stop": None, "resume": f"{output}/checkpoint-5"}
    (first, _), (rest, losses) = runs.train_many(
        1, [{**keys, **killed}, {**keys, **resumed}], run=hf_training, plain=True
    )
    rows = runs.rows(own)
    names = list(rows[0]["drawn"])
    assert len(first) == 5 and len(rest) == 3
    assert [dict(zip(names, counts, strict=True)) for counts in [*first, *rest]] == [row["drawn"] for row in rows]
    assert losses == pytest.approx([row["loss"] * COUNTED for row in rows], rel=2e-3)
    assert Path(f"{output}/checkpoint-8/dataflex_mixture.json").is_file()


def test_two_processes_of_the_trainer_learn_the_same_mixture(folder):
    output = str(folder / "out" / "hf2")
    keys = runs.base(folder, **ODM, output_dir=str(folder / "out" / "unused2"), per_device_train_batch_size=4)
    draws, losses = runs.train_many(2, [{**keys, "hf_output": output, "stop": None, "resume": None}], run=hf_training)[
        0
    ]
    assert len(draws) == 8 and all(sum(counts) == 4 for counts in draws)  # rank 0's half of each batch
    state = json.loads(Path(f"{output}/checkpoint-8/dataflex_mixture.json").read_text())
    one = runs.base(folder, **ODM, output_dir=str(folder / "out" / "own2"))
    status, heard = runs.train_many(1, [one], plain=True)[0]
    assert status == 0, heard
    proportions = [list(row["proportions"].values()) for row in runs.rows(one)]
    assert state["plans"][-1]["proportions"] == pytest.approx(proportions[-1], rel=1e-3)
    assert losses == pytest.approx([row["loss"] * COUNTED for row in runs.rows(one)], rel=2e-3)
