"""The demo model, fine-tuned so that its experts differ: the second model of `lossy.py`.

    python benchmarks/specialised.py OUT [--steps 12] [--rate 0.001] [--demo FOLDER]

The demo's experts are near-copies of one net, so there is little to find for whoever asks which of
them matter. Here each expert first forgets: of the neurons between its matrices, those that the
tokens sent to it on the sample text use least (`FORGOTTEN` of them) are halved twice, in the rows
of up and in the columns of down. Then it learns again from its own tokens, with everything but the
experts frozen. A step moves every matrix by a share of its own size (`--rate`, falling to zero)
against its gradient. No optimiser's state is kept, and a matrix is moved as soon as its gradient is
there, so it takes little more memory than the model. OUT becomes a checkpoint; how far experts lie
apart, and the loss on the text, are printed and kept in OUT/specialised.json. A step takes some
seconds on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zipmoe.calibration import calibration, read_text
from zipmoe.demo import build_checkpoint, cache_folder
from zipmoe.quality import token_losses

WINDOWS = 2  # of 256 tokens, in a step
SEED = 1
FORGOTTEN = 0.4
MATRICES = ("gate_up_proj", "down_proj")


def distances(model: Any) -> dict[str, float]:
    """Distance of two experts' weights over their mean size: over all pairs of all layers."""
    found = []
    for layer in model.model.layers:
        parts = [getattr(layer.mlp.experts, name).flatten(1) for name in MATRICES]
        flat = torch.cat(parts, dim=1).float()
        size = flat.norm(dim=1)
        for one in range(len(flat)):
            apart = (flat[one + 1 :] - flat[one]).norm(dim=1)
            found += (2 * apart / (size[one + 1 :] + size[one])).tolist()
    values = torch.tensor(found)
    median = values.median().item()
    return {"least": values.min().item(), "median": median, "most": values.max().item()}


@torch.no_grad()
def forget(model: Any, windows: torch.Tensor) -> None:
    """Weaken the neurons of every expert that its tokens use least."""
    use = {
        layer.mlp.experts: torch.zeros(layer.mlp.experts.down_proj.shape[::2])
        for layer in model.model.layers
    }

    def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden, index, _ = args
        for expert in range(module.num_experts):
            x = hidden[(index == expert).any(dim=1)]
            gate, up = (x @ module.gate_up_proj[expert].t()).chunk(2, dim=1)
            used = (module.act_fn(gate) * up).float().square().sum(dim=0)
            use[module][expert] += used * module.down_proj[expert].float().square().sum(dim=0)

    hooks = [module.register_forward_pre_hook(note) for module in use]
    for some in windows.split(8):
        model(some, use_cache=False)
    for hook in hooks:
        hook.remove()
    for module, used in use.items():
        count = round(FORGOTTEN * used.shape[1])
        for expert, least in enumerate(used.argsort(dim=1)[:, :count]):
            module.gate_up_proj[expert, used.shape[1] + least] /= 2
            module.down_proj[expert, :, least] /= 2


class Mover:
    """Moves each matrix against its gradient, by a share of its size."""

    def __init__(self, model: Any) -> None:
        self.rate = 0.0
        self._random = torch.Generator().manual_seed(SEED)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.layers:
            for name in MATRICES:
                weights = getattr(layer.mlp.experts, name)
                weights.requires_grad_(True)
                weights.register_post_accumulate_grad_hook(self.move)

    @torch.no_grad()
    def move(self, weights: torch.Tensor) -> None:
        for matrix, gradient in zip(weights, weights.grad, strict=True):
            against = gradient.float()
            size = against.norm()
            if size > 0:  # an expert that no token chose stays
                moved = matrix.float() - against * (self.rate * matrix.float().norm() / size)
                matrix.copy_(self.rounded(moved))
        weights.grad = None

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Round to BF16 up or down at random: a step is smaller than what BF16 tells apart."""
        noise = torch.randint(1 << 16, values.shape, generator=self._random, dtype=torch.int32)
        return ((values.view(torch.int32) + noise) & -65536).view(torch.float32)


def fine_tune(model: Any, windows: torch.Tensor, steps: int, rate: float) -> None:
    mover = Mover(model)
    order = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        began = time.perf_counter()
        some = windows[torch.randperm(len(windows), generator=order)[:WINDOWS]]
        mover.rate = rate * (1 - step / steps)
        loss = model(some, labels=some, use_cache=False).loss
        loss.backward()
        print(f"step {step}: {loss.item():.3f}, {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--demo", type=Path, default=cache_folder())
    options = parser.parse_args()
    torch.manual_seed(SEED)
    demo = build_checkpoint(options.demo).folder
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16).eval()
    windows = calibration(tokenizer, read_text(None)).windows
    found: dict[str, Any] = {"demo": {"distances": distances(model)}}
    forget(model, windows)
    before = token_losses(model, windows[::4]).mean().item()
    fine_tune(model, windows, options.steps, options.rate)
    after = token_losses(model, windows[::4]).mean().item()
    found["specialised"] = {
        "distances": distances(model),
        "loss_before_learning": before,
        "loss": after,
    }
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "specialised.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
