"""PiSSA changes the model that an adapter belongs to: what a run exports has the loss that the run has measured."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive
KEYS = {
    "finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "pissa_init": True, "pissa_iter": -1, "mixer": "static",
    "eval_dataset": "prose", "eval_strategy": "steps", "eval_steps": 6, "max_samples": 12,
    "save_strategy": "steps", "save_steps": 3, "pissa_convert": True,
}  # fmt: skip


def test_an_exported_adapter_on_its_model_has_the_loss_of_the_run(tmp_path):
    from peft import PeftModel

    folder = corpus.write(tmp_path)
    config = runs.base(folder, **KEYS)
    moved = runs.base(
        folder, **{**KEYS, "resume_from_checkpoint": f"{config['output_dir']}/checkpoint-3", "save_strategy": "no"},
        output_dir=str(folder / "moved"),
    )  # fmt: skip
    (folder / "moved").mkdir()  # what the first start has written is there, as the error would ask for
    (folder / "moved" / "pissa_init").symlink_to(f"{config['output_dir']}/pissa_init")
    for status, stderr in runs.train_many(1, [config, moved], plain=True):
        assert status == 0, stderr
    measured = [row["eval_loss"] for row in runs.rows(config, "trainer_log.jsonl") if "eval_loss" in row]
    steps = [{k: v for k, v in row.items() if k != "seconds"} for row in runs.rows(config)]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in runs.rows(moved)] == steps[3:]

    tokenizer = AutoTokenizer.from_pretrained(config["output_dir"])
    ids = []
    for line in (folder / "data" / "prose.jsonl").read_text().splitlines()[: KEYS["max_samples"]]:
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    for adapter in ("", "pissa_converted"):  # the second one belongs to the model as it was loaded
        for output in (config["output_dir"], moved["output_dir"]):
            base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
            model = PeftModel.from_pretrained(base, f"{output}/{adapter}").eval()
            with torch.no_grad():
                logits = model(input_ids=rows).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            assert float(loss) == pytest.approx(measured[-1], abs=2e-5), (adapter, output)
    made = json.loads(Path(config["output_dir"], "pissa_converted", "adapter_config.json").read_text())
    assert made["init_lora_weights"] is True and made["r"] == 2 * KEYS["lora_rank"]
