"""Native norms: the same bits wherever a row stands, and recognised by what they do."""

import copy

import pytest
import torch
from families import families, randomise, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeConfig,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

import zipmoe.norm
from zipmoe import _core
from zipmoe.norm import RMSNorm, replace_norms

ISAS = _core.available_isas()
KINDS = [_core.NormKind.rounded, _core.NormKind.wide, _core.NormKind.wide_plus1]


def norm(x, weight, kind, eps=1e-6, isa=""):
    x = x.contiguous()
    out = torch.empty_like(x)
    _core.rms_norm(
        x.data_ptr(),
        x.numel() // x.shape[-1],
        x.shape[-1],
        0 if weight is None else weight.data_ptr(),
        weight is not None and weight.dtype == torch.float32,
        out.data_ptr(),
        kind=kind,
        eps=eps,
        isa=isa,
    )
    return out


def rows(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 3, count)[:, None]
    return (torch.randn(count, width, generator=generator) * sizes).bfloat16()


def exact(x, weight, kind, eps=1e-6):
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if kind == _core.NormKind.plain:
        return normed
    return (weight.double() + (kind == _core.NormKind.wide_plus1)) * normed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [8, 80, 128, 2048, 2880])
def test_norms_are_within_their_roundings_of_a_float64_reference(isa, width):
    x = rows(9, width)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
        for kind in KINDS:
            out, wanted = norm(x, weight, kind, isa=isa).double(), exact(x, weight, kind)
            # One rounding to BF16, or two; FP32's own errors are far below.
            roundings = 2 if kind == _core.NormKind.rounded else 1
            assert ((out - wanted).abs() <= roundings * 1.01 * 2.0**-8 * wanted.abs() + 1e-38).all()
    plain = norm(x, None, _core.NormKind.plain, isa=isa).double()
    wanted = exact(x, None, _core.NormKind.plain)
    assert ((plain - wanted).abs() <= 1.01 * 2.0**-8 * wanted.abs() + 1e-38).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), width=st.sampled_from([8, 72, 128, 2048]))
def test_instruction_sets_agree_and_a_row_has_the_same_bits_alone(seed, width):
    x = rows(40, width, seed)
    weight = torch.randn(width).bfloat16()
    for kind in KINDS:
        whole = norm(x, weight, kind)
        for isa in ISAS:
            assert torch.equal(norm(x, weight, kind, isa=isa), whole)
        assert torch.equal(norm(x[17], weight, kind), whole[17])
        _core.set_num_threads(1)
        assert torch.equal(norm(x, weight, kind), whole)
        _core.set_num_threads(0)


def test_bad_numbers_stay_in_their_rows():
    x = rows(5, 64)
    weight = torch.ones(64).bfloat16()
    clean = norm(x, weight, KINDS[0])
    x[2, 3] = float("nan")
    x[3, 3] = float("inf")
    out = norm(x, weight, KINDS[0])
    assert out[2].isnan().all()
    assert out[3, 3].isnan()
    assert torch.equal(out[[0, 1, 4]], clean[[0, 1, 4]])


def test_a_weight_that_does_not_fit_its_kind_is_refused():
    with pytest.raises(ValueError, match="weights do not fit"):
        norm(rows(1, 8), None, KINDS[0])


def host(module):
    parent = torch.nn.Module()
    parent.input_layernorm = module
    return parent


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Qwen2MoeRMSNorm(96), "rounded"),
        (lambda: GptOssRMSNorm(96), "wide"),
        (lambda: Gemma4RMSNorm(96), "wide"),
        (lambda: Gemma4RMSNorm(96, with_scale=False), "plain"),
        (lambda: Qwen3NextRMSNorm(96), "wide_plus1"),
    ],
)
def test_a_norm_is_recognised_by_what_it_does(make, kind):
    original = make().bfloat16()
    if getattr(original, "weight", None) is not None:
        original.weight.data.uniform_(0.5, 1.5)
    model = host(copy.deepcopy(original))
    weights = model.state_dict()
    assert replace_norms(model) == (["input_layernorm"], [])
    native = model.input_layernorm
    assert isinstance(native, RMSNorm)
    assert native.kind == getattr(_core.NormKind, kind)
    assert model.state_dict().keys() == weights.keys()
    x = rows(16, 96)
    with torch.no_grad():
        steps = native(x).view(torch.int16).int() - original(x).view(torch.int16).int()
        assert steps.abs().max() <= 1
        assert (steps != 0).float().mean() <= 0.01
        assert torch.equal(native(x.float()), original(x.float()))  # not the core's, as before
    assert replace_norms(model) == (["input_layernorm"], [])  # once is enough


class HalfNorm(Qwen2MoeRMSNorm):
    """Of every other word."""

    def forward(self, x):
        return super().forward(x) * torch.tensor([1.0, 0.5]).repeat(x.shape[-1] // 2).to(x.dtype)


class BiasedNorm(Qwen2MoeRMSNorm):
    def __init__(self, width):
        super().__init__(width)
        self.bias = torch.nn.Parameter(torch.zeros(width))


def test_norms_that_do_something_else_stay():
    for module in (HalfNorm(64), BiasedNorm(64), torch.nn.LayerNorm(64), torch.nn.RMSNorm(64)):
        model = host(module.bfloat16())
        assert replace_norms(model) == ([], ["input_layernorm"])
        assert model.input_layernorm is module


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "qwen3_next", "deepseek_v3"])
def test_norms_of_a_model_are_replaced_and_it_says_the_same(name, monkeypatch):
    import transformers  # noqa: PLC0415

    family = {family.name: family for family in families()}[name]
    torch.manual_seed(0)
    model = getattr(transformers, family.auto).from_config(
        small_config(family), dtype=torch.bfloat16
    )
    randomise(model.eval())
    ids = torch.arange(3, 24)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        replaced, left = replace_norms(model)
        calls = []
        stock = _core.rms_norm
        monkeypatch.setattr(
            zipmoe.norm._core, "rms_norm", lambda *a, **k: (calls.append(1), stock(*a, **k))
        )
        out = model(input_ids=ids).logits
    assert len(replaced) >= 6
    assert calls
    assert all("gated" in type(model.get_submodule(n)).__name__.lower() for n in left), left
    near = torch.nn.functional.cosine_similarity(out.float(), expected.float(), dim=-1)
    assert near.median() > 0.99  # a router of random weights may flip here and there


def test_rotary_embeddings_by_torch_have_the_same_bits_however_a_prompt_is_cut():
    # So they are left to torch: a table of cosines, and elementwise products.
    rotary = Qwen2MoeRotaryEmbedding(Qwen2MoeConfig(hidden_size=512, num_attention_heads=4))
    generator = torch.Generator().manual_seed(0)
    length = 301
    query = torch.randn(2, 4, length, 128, generator=generator).bfloat16()
    key = torch.randn(2, 2, length, 128, generator=generator).bfloat16()
    positions = torch.arange(1000, 1000 + length)[None]

    def rotated(at, batch=slice(None)):
        cos, sin = rotary(key, positions[:, at].expand(query[batch].shape[0], -1))
        parts = query[batch, :, at], key[batch, :, at]
        return apply_rotary_pos_emb(*parts, cos, sin)

    whole = rotated(slice(None))
    pieces = [slice(0, 1), slice(1, 2), slice(2, 19), slice(19, 150), slice(150, 301)]
    for piece in pieces:
        for mine, theirs in zip(rotated(piece), whole, strict=True):
            assert torch.equal(mine, theirs[:, :, piece])
        for mine, theirs in zip(rotated(piece, slice(1, 2)), whole, strict=True):
            assert torch.equal(mine, theirs[1:, :, piece])
