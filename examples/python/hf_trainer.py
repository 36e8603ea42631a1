"""Dynamic mixing inside the Hugging Face Trainer: `python examples/python/hf_trainer.py [DATA] [MODEL] [STEPS]`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import dataflex_mega as dm

data, path, steps = (sys.argv[1:] + [".demo/data", ".demo/model", "12"][len(sys.argv) - 1 :])[:3]
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
domains = {}
for name in ("demo_c4", "demo_wiki", "demo_python"):
    lines = (Path(data) / f"{name}.jsonl").read_text().splitlines()[:200]
    domains[name] = dm.tokenize([json.loads(line) for line in lines], tokenizer, max_length=64)

mixture = dm.MixtureBatchSampler({n: len(rows) for n, rows in domains.items()}, 8, seed=0, mixer="odm", update_every=3)
with tempfile.TemporaryDirectory() as output:
    args = TrainingArguments(
        output, per_device_train_batch_size=8, max_steps=int(steps), learning_rate=1e-3, logging_steps=4, save_steps=4,
        ignore_data_skip=True, report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = dm.integrations.MixtureTrainer(
        model, args, train_dataset=ConcatDataset(list(domains.values())), mixture=mixture,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.train()
print("proportions:", {name: round(p, 3) for name, p in mixture.proportions.items()})
