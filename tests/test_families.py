"""Every family gives the bits of stock transformers, or is refused by name; none is left out."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from families import REFUSED, answers, families, write_checkpoint
from family_sweep import (
    FULL,
    compare,
    forward_only,
    outside,
    row,
    stock_model,
    sweep,
    sweep_all,
    table,
)
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import zipmoe
from zipmoe._outside import OUTSIDE

ROOT = Path(__file__).resolve().parent.parent
PAGE, SET = ROOT / "docs" / "families.md", ROOT / "src" / "zipmoe" / "_outside.py"
ALL = {family.name: family for family in families()}
# Interleaved, shared expert, plain, latent attention, ungated, look-alike, GELU; two by lot.
KINDS = ["gpt_oss", "qwen2_moe", "mixtral", "deepseek_v3", "nemotron_h", "longcat_flash", "gemma4"]
LOT = random.Random(20261122).sample(sorted(ALL.keys() - set(KINDS)), 2)


@pytest.mark.parametrize("name", KINDS + LOT)
def test_a_family_answers_bit_for_bit_as_stock_transformers(name, tmp_path):
    outcome = sweep(ALL[name], tmp_path)
    assert outcome.differences == []
    assert f"| {name} {row(outcome)}" in PAGE.read_text().splitlines()
    assert list(OUTSIDE.get(name, ())) == outcome.depends_on


def test_the_page_accounts_for_every_family_that_transformers_decorates():
    rows = re.findall(
        r"^\| (\w+) \| (full|forward only|refused) \|", PAGE.read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(ALL.keys() | REFUSED.keys())
    assert sum(status == FULL for _, status in rows) >= 55
    for name, status in rows:
        assert (status == "refused") == (name in REFUSED)
        assert (status == FULL) == (name in ALL and ALL[name].auto is not None)


def test_a_family_without_a_language_model_has_an_exact_forward_pass():
    _, _, same = forward_only("openai_privacy_filter")
    assert same


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_of_other_shapes_are_refused_by_name(name, tmp_path):
    model_type = name.replace("nllb_moe", "nllb-moe")
    config = CONFIG_MAPPING[model_type]().to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, **config}, default=str)
    )
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(zipmoe.UnsupportedModelError, match=model_type) as caught:
        zipmoe.pack_checkpoint(tmp_path, tmp_path / "store")
    assert "mixtral" in str(caught.value)  # what works instead


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings_are_kept(tied, tmp_path):
    write_checkpoint(ALL["olmoe"], tmp_path / "c", tied=tied)
    stock = stock_model(ALL["olmoe"], tmp_path / "c")
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied
    zipmoe.pack_checkpoint(tmp_path / "c", tmp_path / "s")
    assert compare(answers(stock), tmp_path / "s") == []
    with zipmoe.load(tmp_path / "s", memory="64GB") as (model, _):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_exact(dtype, tmp_path):
    write_checkpoint(ALL["qwen3_moe"], tmp_path / "c", dtype=dtype)
    stock = stock_model(ALL["qwen3_moe"], tmp_path / "c", dtype)
    zipmoe.pack_checkpoint(tmp_path / "c", tmp_path / "s")
    assert compare(answers(stock), tmp_path / "s") == []


def test_routers_kept_in_fp32_stay_fp32(tmp_path):
    name = "hy_v4"
    write_checkpoint(ALL[name], tmp_path / "c")
    stock = stock_model(ALL[name], tmp_path / "c")
    wide = {n for n, p in stock.named_parameters() if p.dtype == torch.float32}
    assert wide
    zipmoe.pack_checkpoint(tmp_path / "c", tmp_path / "s")
    with zipmoe.load(tmp_path / "s", memory="64GB") as (model, _):
        assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == wide


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "longcat_flash"])
def test_one_flipped_bit_of_one_expert_weight_is_seen(name, tmp_path):
    write_checkpoint(ALL[name], tmp_path / "c")
    expected = answers(stock_model(ALL[name], tmp_path / "c"))
    flip_one_bit(tmp_path / "c", "down_proj" if name != "mixtral" else "w2")
    zipmoe.pack_checkpoint(tmp_path / "c", tmp_path / "s")
    assert compare(expected, tmp_path / "s") != []


def flip_one_bit(checkpoint: Path, part: str) -> None:
    """Flip the top bit of the mantissa of a weight of the first expert tensor of that name."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name in sorted(header):
            if "experts" in name and part in name and "bias" not in name and "shared" not in name:
                data[8 + length + header[name]["data_offsets"][0]] ^= 0x40
                path.write_bytes(data)
                return
    raise AssertionError("no expert tensor to flip a bit of")


@pytest.mark.soak
@pytest.mark.parametrize("tied", [None, True, False])
def test_all_families_in_full(tied, tmp_path, soak_record):
    outcomes = sweep_all(tmp_path, tied=tied, seed=soak_record.seed)
    exact = [outcome for outcome in outcomes if not outcome.differences]
    assert [(o.family, o.differences) for o in outcomes if o.differences] == []
    full = sum(outcome.status == FULL for outcome in exact)
    soak_record("families bit for bit as stock", tied=str(tied), families=len(exact), full=full)
    assert full >= 55
    if tied is None:
        assert table(outcomes) == PAGE.read_text()
        assert outside(outcomes) == SET.read_text()
