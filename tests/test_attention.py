"""Native attention: near a float64 reference, and no bit depends on what is not a row's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core, attention
from zipmoe.attention import attend

ISAS = _core.available_isas()
cores = {isa: _core.Attention(threads=2, isa=isa) for isa in ISAS}


def tensors(batch, heads, kv_heads, queries, keys, widths=(64, 64), seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return (
        (spread * normal(batch, heads, queries, widths[0])).bfloat16(),
        normal(batch, kv_heads, keys, widths[0]).bfloat16(),
        normal(batch, kv_heads, keys, widths[1]).bfloat16(),
    )


def weights_of(query, key, scaling, *, allowed=None, softcap=0.0, bias=None, sinks=None):
    """Weights [batch, heads, queries, keys] in float64, and the scores' sizes |q| |k|."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * scaling
    size = query.abs() @ key.abs().mT * abs(scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
        size = size + bias.double().abs()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    if sinks is not None:
        column = sinks.double().expand(scores.shape[:3]).unsqueeze(-1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights[..., : key.shape[2]], size


def check_near(out, query, key, value, scaling, **rule):
    """Within the bound that follows from the order in attention_kernels.h, term by term."""
    weights, size = weights_of(query, key, scaling, **rule)
    value = value.double().repeat_interleave(query.shape[1] // value.shape[1], 1)
    exact = (weights @ value).transpose(1, 2)
    ulp = 2.0**-24
    # A score: at most width / 32 * 2 + 4 roundings of partial sums no larger than |q| |k|, and a
    # few more for scaling, soft-cap (3e-7 of it) and bias.
    score_error = (query.shape[3] / 16 + 12) * ulp * size
    score_error = score_error.amax(-1, keepdim=True) + rule.get("softcap", 0.0) * 1e-6
    # A weight changes by twice the largest error of its row's scores; exp and the sum add theirs.
    relative = 2 * score_error + (key.shape[2] / 16 + 16) * ulp
    sum_error = (key.shape[2] + 4) * ulp  # of p v, one after the other
    error = ((relative + sum_error) * (weights @ value.abs())).transpose(1, 2)
    bound = 2.0**-8 * exact.abs() + 1.01 * error + 1e-30
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert ((out.double() - exact).abs() <= bound).all()


CASES = {
    "groups": ((2, 8, 2, 9, 70), (64, 64)),
    "latent": ((1, 4, 4, 33, 33), (192, 128)),
    "odd widths": ((1, 3, 1, 5, 131), (80, 48)),
    "small": ((1, 2, 2, 3, 3), (16, 8)),
    "decode": ((1, 12, 2, 1, 300), (128, 128)),
    "many heads": ((1, 40, 1, 2, 65), (32, 256)),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_within_its_bound_of_a_float64_reference(isa, name):
    shape, widths = CASES[name]
    query, key, value = tensors(*shape, widths, seed=len(name))
    scaling = widths[0] ** -0.5
    generator = torch.Generator().manual_seed(1)
    batch, heads, _, queries, keys = shape
    allowed = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    sinks = torch.randn(1, heads, 1, generator=generator)
    bias = torch.randn(batch, heads, queries, keys, generator=generator)
    core = cores[isa]
    assert core.isa == isa

    def check(**rule):
        own = {**rule, "mask": rule["allowed"]} if "allowed" in rule else dict(rule)
        own.pop("allowed", None)
        out = attend(query, key, value, scaling=scaling, core=core, **own)
        check_near(out, query, key, value, scaling, **rule)

    check()
    check(allowed=allowed)
    check(allowed=allowed, sinks=sinks)
    check(softcap=5.0)
    check(allowed=allowed, bias=bias, sinks=sinks, softcap=20.0)


def test_all_but_vdpbf16ps_give_the_same_bits():
    query, key, value = tensors(1, 8, 2, 37, 150, (96, 80))
    outs = [
        attend(query, key, value, scaling=0.1, causal=True, offset=113, softcap=9.0, core=core)
        for isa, core in cores.items()
        if isa != "avx512bf16"
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(1, 150),
    window=st.sampled_from([0, 1, 7, 64, 100]),
    padding=st.integers(0, 70),
    cut=st.floats(0, 1),
    groups=st.sampled_from([1, 3, 8]),
)
def test_a_row_has_the_same_bits_however_it_is_computed(
    isa, seed, length, window, padding, cut, groups
):
    query, key, value = tensors(2, 2 * groups, 2, length, length, (48, 40), seed)
    core = cores[isa]
    common = {"scaling": 0.2, "core": core}
    whole = attend(query, key, value, causal=True, window=window, **common)

    # in two chunks; alone in the batch; in one thread
    at = round(cut * length)
    parts = [
        attend(
            query[:, :, :at], key[:, :, :at], value[:, :, :at], causal=True, window=window, **common
        ),
        attend(query[:, :, at:], key, value, causal=True, offset=at, window=window, **common),
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    alone = attend(query[1:], key[1:], value[1:], causal=True, window=window, **common)
    assert torch.equal(alone[0], whole[1])
    single = _core.Attention(threads=1, isa=isa)
    out = attend(query, key, value, causal=True, window=window, scaling=0.2, core=single)
    assert torch.equal(out, whole)

    # padded on the left with keys that must not be looked at, by a boolean or an added mask
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    allowed = (columns <= rows) & ((columns > rows - window) if window else True)
    allowed = torch.cat([torch.zeros(length, padding, dtype=torch.bool), allowed], 1)[None, None]
    junk = torch.full((2, 2, padding, 48), math.nan).bfloat16()
    padded = torch.cat([junk, key], 2), torch.cat([junk[..., :40], value], 2)
    assert torch.equal(attend(query, *padded, mask=allowed, **common), whole)
    for dtype in (torch.bfloat16, torch.float32):
        lowest = torch.finfo(dtype).min
        added = torch.where(allowed, torch.zeros((), dtype=dtype), lowest)
        assert torch.equal(attend(query, *padded, mask=added, **common), whole)

    # the last row alone, over the keys that it sees and no others, as a cache that dropped them
    first = max(0, length - window) if window else 0
    last = attend(query[:, :, -1:], key[:, :, first:], value[:, :, first:], **common)
    assert torch.equal(last[:, 0], whole[:, -1])


@pytest.mark.parametrize("isa", ISAS)
def test_keys_left_out_in_the_middle_count_as_if_they_were_not_there(isa):
    query, key, value = tensors(1, 4, 2, 6, 200)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(200, generator=generator) > 0.4
    mask = chosen.expand(1, 1, 6, 200)
    masked = attend(query, key, value, scaling=0.1, mask=mask, core=cores[isa])
    out = attend(query, key[:, :, chosen], value[:, :, chosen], scaling=0.1, core=cores[isa])
    assert torch.equal(masked, out)


@pytest.mark.parametrize("isa", ISAS)
def test_strides_do_not_matter(isa):
    query, key, value = tensors(2, 4, 2, 5, 90)
    expected = attend(query, key, value, scaling=0.1, core=cores[isa])
    # the cache's layout after transpose, and a view of one with more room
    room = torch.zeros(2, 128, 2, 64, dtype=torch.bfloat16)
    room[:, :90] = key.transpose(1, 2)
    across = room.transpose(1, 2)[:, :, :90]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(query, across, value, scaling=0.1, core=cores[isa]), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_keys_are_zero_and_bad_numbers_stay_in_their_rows(isa):
    query, key, value = tensors(1, 2, 1, 8, 70)
    mask = torch.ones(1, 1, 8, 70, dtype=torch.bool)
    mask[:, :, 2] = False
    sinks = torch.zeros(1, 2, 1)
    clean = attend(query, key, value, scaling=0.1, mask=mask, sinks=sinks, core=cores[isa])
    assert (clean[:, 2] == 0).all()
    # A key that only row 5 sees.
    mask[..., 69] = False
    expected = attend(query, key, value, scaling=0.1, mask=mask, core=cores[isa])
    mask[:, :, 5, 69] = True
    for tensor, bad in ((key, math.nan), (key, math.inf), (value, math.nan)):
        changed = tensor.clone()
        changed[:, :, 69] = bad
        args = (query, changed, value) if tensor is key else (query, key, changed)
        out = attend(*args, scaling=0.1, mask=mask, core=cores[isa])
        assert out[:, 5].isnan().all()
        others = [0, 1, 2, 3, 4, 6, 7]
        assert torch.equal(out[:, others], expected[:, others])


def test_a_changed_bit_of_a_key_changes_the_output():
    query, key, value = tensors(1, 2, 1, 1, 70)
    expected = attend(query, key, value, scaling=1.0)
    key.view(torch.int16)[0, 0, 33, 5] ^= 1 << 6
    assert not torch.equal(attend(query, key, value, scaling=1.0), expected)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = tensors(1, 3, 2, 1, 4)
    with pytest.raises(ValueError, match="no multiple"):
        attend(query, key, value, scaling=1.0)
    with pytest.raises(ValueError, match="window"):
        attend(query[:, :2], key, value, scaling=1.0, window=3)


class Module(torch.nn.Module):
    is_causal = True


def call(query, key, value, mask=None, module=None, **kwargs):
    kwargs = {"scaling": 0.1, "dropout": 0.0, **kwargs}
    return attention.attention_forward(module or Module(), query, key, value, mask, **kwargs)[0]


def test_what_the_core_does_not_do_falls_back_and_says_why():
    attention.FALLBACKS.clear()
    query, key, value = tensors(1, 4, 2, 5, 5)
    call(query, key, value, sliding_window=3, position_ids=torch.arange(5), cu_seq_lens_q=None)
    assert attention.FALLBACKS.reasons() == {}
    module = Module()
    module.num_key_value_groups = 2
    call(query.float(), key.float(), value.float(), module=module)
    call(query.clone().requires_grad_(), key, value, module=module)
    call(query, key, value, module=module, dropout=1e-9)
    assert attention.FALLBACKS.reasons() == {"float32": 1, "gradients": 1, "dropout": 1}
    with pytest.raises(ValueError, match="novel"):
        call(query, key, value, module=module, novel=3)
    attention.FALLBACKS.clear()


def test_which_keys_are_whose_is_never_guessed():
    query, key, value = tensors(1, 4, 2, 5, 9)
    with pytest.raises(ValueError, match="without a mask"):
        call(query, key, value)
    assert call(query, key, value, is_causal=False).shape == (1, 5, 4, 64)
    assert call(query[:, :, :1], key, value).shape == (1, 1, 4, 64)
