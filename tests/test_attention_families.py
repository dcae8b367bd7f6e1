"""Families of transformers with native attention: each call near eager in FP32, no fallback."""

import pytest
from attention_families import differences
from families import families

from zipmoe import attention

FAMILIES = {family.name: family for family in families() if family.auto is not None}
# One for each way to call attention: plain, sinks (three kinds), latent, selections (two), masks
# with a window, soft-cap and images, position bias, no scaling.
QUICK = (
    "mixtral",
    "gpt_oss",
    "granitemoe_swa",
    "mimo_v2_flash",
    "deepseek_v3",
    "deepseek_v32",
    "minimax_m3_vl",
    "gemma4",
    "inkling",
)
# What stock transformers cannot do with tiny random models of these, by the error it gives.
STOCK_FAILS = {
    "deepseek_v4": "static",
    "diffusion_gemma": "torch.finfo",
    "inkling2": "same dtype",
    "unlimited_ocr": "must match",
}


def check(name):
    attention.FALLBACKS.clear()
    compared, errors = differences(FAMILIES[name])
    if name in STOCK_FAILS:
        assert all("stock fails" in error and STOCK_FAILS[name] in error for error in errors)
        return compared
    assert errors == []
    assert compared >= 9
    assert attention.FALLBACKS.reasons() == {}
    return compared


@pytest.mark.parametrize("name", QUICK)
def test_each_call_of_a_family_is_near_eager_in_fp32(name):
    check(name)


@pytest.mark.soak
def test_each_call_of_every_family_is_near_eager_in_fp32(soak_record):
    compared = {name: check(name) for name in FAMILIES}
    soak_record("attention calls", families=len(compared), calls=sum(compared.values()))


def test_a_wrong_mask_is_seen(monkeypatch):
    def without_padding(*args, **kwargs):
        return stock(*args, **{**kwargs, "attention_mask": None})

    stock = attention.mask
    attention.register()
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: PLC0415

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "zipmoe", without_padding)
    _, errors = differences(FAMILIES["mixtral"], ("padded",))
    assert errors
