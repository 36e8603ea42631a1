"""Stands for dataflex_mega.train in tests of the runner: no model, the same files, in a fraction of a second.

Keys: `fail` writes an error and stops; `delay` seconds a step. A checkpoint is made at every second step, from which it
continues; `starts.log` in the parent folder has a line for each start.
"""

import json
import sys
import time
from pathlib import Path

import yaml


def main(path):
    config = yaml.safe_load(Path(path).read_text())
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    done = max([int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")], default=0)
    with (folder.parent / "starts.log").open("a") as stream:
        stream.write(f"{folder.name} {done}\n")
    if config.get("fail"):
        print("some words\nerror: fail: found True\nmore words", file=sys.stderr)
        return 2
    for step in range(done + 1, config["max_steps"] + 1):
        time.sleep(config.get("delay", 0))
        with (folder / "times.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "seconds": 0.5}) + "\n")
        if step % 2 == 0:
            (folder / f"checkpoint-{step}").mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": config["max_steps"]}))
    (folder / "tokenizer_config.json").write_text("{}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
