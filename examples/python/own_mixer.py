"""Train with a mixer of one's own: `python examples/python/own_mixer.py [DATA] [MODEL] [STEPS]`."""

import sys
from dataclasses import dataclass

import torch

import dataflex_mega as dm

data, model, steps = (sys.argv[1:] + [".demo/data", ".demo/model", "20"][len(sys.argv) - 1 :])[:3]


@dataclass
class Lift(dm.Mixer):
    """Draws the domain with the highest loss more often than the others."""

    lift: float = 3.0

    def observe(self, stats, proportions, step):
        """Keep the mean loss of each domain."""
        self.loss = stats.domain_loss / stats.domain_tokens.clamp(min=1)

    def proportions(self, context, rng):
        """[k] float64, sums to 1."""
        weights = torch.ones_like(self.loss)
        weights[self.loss.argmax()] = self.lift
        return weights / weights.sum()


config = {
    "model_name_or_path": model, "stage": "pt", "finetuning_type": "full", "dataset_dir": data,
    "dataset": "demo_c4,demo_wiki,demo_python", "cutoff_len": 64, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
}  # fmt: skip
result = dm.train(config, mixer=Lift(), warmup_step=4, update_step=4, update_times=-1, max_steps=int(steps))
print(f"loss {result.metrics[0]['loss']:.3f} -> {result.metrics[-1]['loss']:.3f}")
print("proportions:", {name: round(p, 3) for name, p in result.final_proportions.items()})
