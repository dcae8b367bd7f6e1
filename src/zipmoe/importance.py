"""How much quality each expert costs when it is lowered: measured one by one, or estimated.

*Exhaustive*, as EdgeMoE (arXiv 2308.14352) does it: one expert at a time in INT2, all others in
INT4, and the loss is measured. The text is run through once for each expert.

*Estimate*: one pass over the text with gradients. Lowering expert e adds to the residual stream,
for each token t that chose it, an error d(t): the difference of its outputs times the token's
router weight. With g(t), the gradient of the text's loss there, the loss changes by the sum of
g(t).d(t) to first order. That sum has no sign of its own: other tokens have other errors, so what
it says of this text does not hold for the next one. Its square does; so an expert's importance is
the sum of (g(t).d(t))^2 over its tokens, a diagonal Fisher estimate of the second order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from zipmoe._errors import CalibrationError
from zipmoe._expert_source import ExpertMatrix
from zipmoe.lowered import LOSSLESS
from zipmoe.quality import passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from zipmoe.lowered import LoweredExperts, Place

    Importance = Mapping[Place, float]
    Measure = Callable[[Mapping[Place, str]], float]  # widths → negative log-likelihood

__all__ = ["Importance", "errors", "estimate", "exhaustive", "spearman"]

PASS_TOKENS = 512  # with gradients a pass takes much more memory


def exhaustive(places: Sequence[Place], measure: Measure) -> dict[Place, float]:
    """Measure the loss that each of `places` causes alone in INT2, all others being in INT4.

    So the paper has it, whatever widths are chosen between later: what one expert of many loses in
    INT4 is less than the rounding of sums.
    """
    low, high = "int2", "int4"
    all_high = dict.fromkeys(places, high)
    before = measure(all_high)
    return {place: measure(all_high | {place: low}) - before for place in places}


def estimate(expected: Mapping[str, Importance], pair: tuple[str, str]) -> dict[Place, float]:
    """Give what lowering each expert from the higher to the lower width of `pair` should cost."""
    low, high = pair
    return {place: cost - expected[high][place] for place, cost in expected[low].items()}


def errors(
    model: Any,
    windows: Tensor,
    lowered: LoweredExperts,
    widths: Sequence[str],
    *,
    after_pass: Callable[[], object] | None = None,
) -> dict[str, dict[Place, float]]:
    """Estimate for each width, and each expert, the importance of lowering it from lossless.

    Parameters
    ----------
    model : loaded with compute="torch".
    lowered : what its experts come from. They are lossless afterwards.
    windows : [windows, tokens].

    Returns
    -------
    Mapping
        Of each width, the sum of (g.d)^2 over the tokens of each expert; 0 for an expert that no
        token chose.

    Raises
    ------
    CalibrationError
        The model's experts do not run through transformers' experts interface.
    """
    collected = _Collected(lowered, [width for width in widths if width != LOSSLESS])
    handles = [module.register_forward_hook(collected.hook) for module in _experts(model)]
    embedding = model.get_input_embeddings().register_forward_hook(collected.begin)
    try:
        for some in passes(windows, PASS_TOKENS):
            with torch.enable_grad():
                logits = model(some, use_cache=False).logits[:, :-1]
                loss = cross_entropy(
                    logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum"
                )
                torch.autograd.grad(loss, collected.embedded)
            if after_pass:
                after_pass()
    finally:
        for handle in (*handles, embedding):
            handle.remove()
    return collected.sums | {LOSSLESS: dict.fromkeys(collected.places, 0.0)}


def _experts(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "down_proj", None), ExpertMatrix):
            if not hasattr(module, "has_gate"):
                raise CalibrationError(
                    f"{name} does not run through transformers' experts interface, so gradients "
                    "cannot be followed through it: use --importance exhaustive"
                )
            yield module


class _Collected:
    """Sums of what is seen in backward passes."""

    def __init__(self, lowered: LoweredExperts, widths: Sequence[str]) -> None:
        self._lowered = lowered
        lowered.set_widths({})
        self.sums: dict[str, dict[Place, float]] = {width: {} for width in widths}
        self.places: list[Place] = []
        self.embedded: Tensor = torch.empty(0)

    def begin(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
        """Note where the gradients end: what the embedding gives."""
        self.embedded = embedded.detach().requires_grad_()
        return self.embedded

    def hook(self, module: Any, args: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Tensor:
        """Put the gradients that an experts module has not in the place of its refusal."""
        hidden, index, weights = args
        layer = module.down_proj.layer
        if (layer.ordinal, 0) not in self.places:
            added = [(layer.ordinal, expert) for expert in range(layer.experts)]
            self.places += added
            for sums in self.sums.values():
                sums.update(dict.fromkeys(added, 0.0))
        return _Experts.apply(hidden, weights, out.detach(), (index, module, self))  # type: ignore[no-untyped-call]

    def see(self, module: Any, expert: int, x: Tensor, y: Tensor, scaled: Tensor) -> None:
        """Take an expert's inputs and outputs [tokens, hidden], and the gradients of the latter."""
        place = module.down_proj.layer.ordinal, expert
        for width, sums in self.sums.items():
            self._lowered.set_widths({place: width})
            difference = _run(module, expert, x, _weights(module, expert)).float() - y.float()
            product = (difference * scaled.float()).sum(dim=-1)
            sums[place] += float(product.square().sum())
        self._lowered.set_widths({})


class _Experts(torch.autograd.Function):
    """The output that an experts module has computed, with gradients found by computing again.

    So no expert's weights are held between the forward and the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, out: Tensor, seen: Any) -> Tensor:
        index, *ctx.seen = seen
        ctx.save_for_backward(hidden, weights, index)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weights, index = ctx.saved_tensors
        module, collected = ctx.seen
        to_hidden = torch.zeros(hidden.shape)
        to_weights = torch.zeros(weights.shape)
        for expert in range(module.num_experts):
            token, slot = (index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            x = hidden[token].requires_grad_()
            scaled = grad[token] * weights[token, slot].unsqueeze(1).to(grad.dtype)
            with torch.enable_grad():
                y = _run(module, expert, x, _weights(module, expert))
                (to_x,) = torch.autograd.grad(y, x, scaled.to(y.dtype))
            to_hidden.index_add_(0, token, to_x.float())
            to_weights[token, slot] = (grad[token] * y.detach()).sum(dim=-1).float()
            collected.see(module, expert, x.detach(), y.detach(), scaled)
        return to_hidden.to(hidden.dtype), to_weights.to(weights.dtype), None, None


def _weights(module: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Decode what stands before the activation, and what comes after: [outputs, inputs] both."""
    standin = module.down_proj
    source, layer = standin.source, standin.layer
    if module.has_gate:
        first = source.gate_up(layer, expert, interleaved=standin.interleaved, own=True)
    else:
        first = source.single(layer, expert, "up", own=True)
    down = source.single(layer, expert, "down", own=True)
    return first.to(standin.dtype), down.to(standin.dtype)


def _run(module: Any, expert: int, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Run one expert on the states of its tokens, as `experts_forward` does."""
    first, down = weights
    h = x.to(first.dtype) @ first.t()
    if module.has_bias:
        h = h + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
    y = (module._apply_gate(h) if module.has_gate else module.act_fn(h)) @ down.t()
    if module.has_bias:
        y = y + module.down_proj_bias[expert]
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two rankings; equal values share the mean of their ranks."""
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(middles[place], np.float64)
