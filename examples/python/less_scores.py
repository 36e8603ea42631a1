"""LESS scores of training rows for a Hugging Face model: `python examples/python/less_scores.py [DATA] [MODEL]`."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dataflex_mega as dm

data, path = (Path(p) for p in ([*sys.argv[1:], ".demo/data", ".demo/model"])[:2])


def rows(name, count):
    """The first rows of a dataset of the demo."""
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()[:count]]


model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
train = rows("demo_c4", 40) + rows("demo_python", 40)
targets = {"code": rows("demo_python_validation", 16)}
scores = dm.less_scores(model, tokenizer, train, targets, max_length=128)
print(f"{len(scores)} scores; mean of web text {scores[:40].mean():.4f}, of Python {scores[40:].mean():.4f}")
print("the best rows:", scores.topk(5).indices.tolist())
