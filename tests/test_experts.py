"""The experts function: grouped_mm's bits at real shapes, and faults that leave it usable."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from family_sweep import rebind
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from zipmoe import CorruptError, FetchError
from zipmoe.experts import ExpertSource, experts_forward, needs_whole


def experts(kind, *, count, hidden, inner, act="silu", dtype=torch.bfloat16):
    """A module of random experts, and its config."""
    config = SimpleNamespace(
        num_experts=count,
        num_local_experts=count,
        hidden_size=hidden,
        intermediate_size=inner,
        moe_intermediate_size=inner,
        hidden_act=act,
        hidden_activation=act,
        _experts_implementation="grouped_mm",
    )
    torch.manual_seed(0)
    module = kind(config).to(dtype)
    for weight in module.parameters():
        weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return module


def routed(tokens, count, k, hidden, *, weights=torch.bfloat16, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, count, generator=generator)
    chosen = scores.topk(k)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return states, chosen.indices, chosen.values.to(weights)


def hosted(module):
    host = torch.nn.Module()
    host.experts = module
    return rebind(host)


SHAPES = [  # Qwen1.5-MoE, Qwen3-30B (with fewer experts); widths that are no multiple of a vector
    (Qwen2MoeExperts, 10, 2048, 1408, 4, "silu"),
    (Qwen2MoeExperts, 16, 2048, 768, 8, "silu"),
    (MixtralExperts, 8, 72, 40, 2, "silu"),
    (Gemma4TextExperts, 16, 96, 40, 4, "gelu_pytorch_tanh"),
    (MixtralExperts, 8, 72, 40, 2, "gelu"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0].__name__}-{s[2]}x{s[3]}-{s[5]}")
def test_the_bits_are_those_of_grouped_mm(shape):
    kind, count, hidden, inner, k, act = shape
    module = experts(kind, count=count, hidden=hidden, inner=inner, act=act)
    cases = [
        routed(tokens, count, k, hidden, weights=weights)
        for tokens in (1, 2, 7, 33, 128)
        for weights in (torch.bfloat16, torch.float32)
    ]
    with torch.no_grad():
        expected = [module(*case) for case in cases]
        cache = hosted(module)
        for case, wanted in zip(cases, expected, strict=True):
            assert torch.equal(experts_forward(module, *case), wanted)
    assert wanted.abs().max() > 0
    assert all(ids == sorted(set(ids)) for _, ids in cache.prefetched)
    assert len(cache.prefetched) == len(cases)  # one call per layer and pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_give_the_bits_of_grouped_mm(dtype):
    module = experts(MixtralExperts, count=8, hidden=72, inner=40, dtype=dtype)
    cases = [routed(t, 8, 2, 72, weights=dtype, dtype=dtype) for t in (1, 5, 40)]
    with torch.no_grad():
        expected = [module(*case) for case in cases]
        hosted(module)
        for case, wanted in zip(cases, expected, strict=True):
            assert torch.equal(experts_forward(module, *case), wanted)


def test_an_activation_that_depends_on_its_place_sees_all_rows_at_once():
    for act, whole in (("silu", False), ("gelu", True), ("relu", False)):
        module = experts(MixtralExperts, count=2, hidden=16, inner=16, act=act)
        hosted(module)
        assert needs_whole(module) == whole, act
    wide = experts(MixtralExperts, count=2, hidden=16, inner=16, dtype=torch.float32)
    hosted(wide)
    assert needs_whole(wide)


def test_ids_beyond_the_last_expert_count_nothing():
    module = experts(MixtralExperts, count=4, hidden=32, inner=16)
    states, index, weights = routed(6, 4, 2, 32)
    index[2:4] = 4  # what expert parallelism marks as another machine's
    module._is_expert_parallel = True
    with torch.no_grad():
        expected = module(states, index.clone(), weights)
        hosted(module)
        assert torch.equal(experts_forward(module, states, index, weights), expected)
    assert expected[2:4].abs().max() == 0


@pytest.mark.parametrize("error", [FetchError("no"), CorruptError("bad", layer=0, expert=1)])
def test_after_a_fault_the_same_call_gives_the_right_bits(error):
    module = experts(MixtralExperts, count=4, hidden=32, inner=16)
    case = routed(6, 4, 2, 32)
    with torch.no_grad():
        expected = module(*case)
        cache = hosted(module)
        cache.fail = {4: error}
        with pytest.raises(type(error)):
            experts_forward(module, *case)
        assert torch.equal(experts_forward(module, *case), expected)


def test_threads_that_share_a_model_do_not_share_a_buffer():
    module = experts(MixtralExperts, count=4, hidden=64, inner=48)
    cases = [routed(t, 4, 2, 64) for t in (3, 5, 9, 12)]
    with torch.no_grad():
        expected = [module(*case) for case in cases]
        hosted(module)
    wrong = []

    def run(case, wanted):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(experts_forward(module, *case), wanted):
                    wrong.append(case)  # noqa: PERF401

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_stand_in_gives_is_the_callers_to_keep():
    module = experts(MixtralExperts, count=4, hidden=32, inner=16)
    wanted = [module.gate_up_proj[e].clone() for e in range(4)]
    hosted(module)
    got = [module.gate_up_proj[e] for e in torch.arange(4)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert module.gate_up_proj.shape == (4, 32, 32)
    assert (module.gate_up_proj.dim(), module.gate_up_proj.size(0), len(module.gate_up_proj)) == (
        3,
        4,
        4,
    )


def test_whole_tensors_copies_and_gradients_are_refused_loudly():
    module = experts(MixtralExperts, count=4, hidden=32, inner=16)
    states, index, weights = routed(6, 4, 2, 32)
    with pytest.raises(TypeError, match="for models loaded"):
        experts_forward(module, states, index, weights)
    hosted(module)
    with pytest.raises(TypeError, match="one at a time"):
        module.down_proj[torch.tensor([0, 1])]
    with pytest.raises(AttributeError, match="read on demand"):
        module.down_proj.transpose(1, 2)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(module)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(module.down_proj)
    out = experts_forward(module, states.requires_grad_(), index, weights)
    with pytest.raises(RuntimeError, match="no gradients"):
        out.sum().backward()


def test_the_decoded_area_is_what_is_counted_for_it():
    module = experts(MixtralExperts, count=4, hidden=32, inner=16)
    hosted(module)
    source = module.down_proj.source
    with torch.no_grad():
        experts_forward(module, *routed(6, 4, 2, 32))
    held = sum(buffer.bits.nbytes for buffer in source._buffers.values())
    assert held == ExpertSource.buffer_bytes(source.layers) == 2 * (32 * 32 + 32 * 16)
