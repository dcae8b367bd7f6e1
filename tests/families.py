"""Every family that transformers' experts interface decorates, each as a tiny random model.

The list is read off transformers' own source and registries, so a family added by a new release
shows up here by itself. What a family needs beyond the generic shrinking of its default config
stands in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# Undecorated, but of the same shape: experts are indexed as gate_up_proj[e], down_proj[e].
LOOK_ALIKES = ("longcat_flash", "step3p7")

# Families whose experts are of another shape; `zipmoe pack` names them and what works instead.
REFUSED = {
    "dbrx": "its experts are one flat matrix, multiplied by a forward of its own",
    "jetmoe": "its experts, and its attention's, are run by a forward of its own that visits all",
    "llama4": "it multiplies every token by every expert: none could stay out of memory",
    "nllb_moe": "an encoder-decoder whose experts are modules of their own",
    "switch_transformers": "an encoder-decoder whose experts are modules of their own",
}


@dataclass(frozen=True)
class Family:
    """One family, and the auto class that builds its language model."""

    name: str
    auto: str | None  # "AutoModelForCausalLM", "AutoModelForImageTextToText" or None
    model_type: str | None
    architecture: str | None


def families() -> list[Family]:
    """All decorated families and the look-alikes, sorted by name."""
    root = Path(transformers.__file__).parent / "models"
    decorated = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    return [_family(name) for name in sorted(decorated | set(LOOK_ALIKES))]


def _family(name: str) -> Family:
    for auto, names in (
        ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        found = [
            (model_type, arch if isinstance(arch, str) else arch[0])
            for model_type, arch in names.items()
            if model_type_to_module_name(model_type) == name
        ]
        if found:
            # A text config (the longer model type) is preferred to the composite one.
            model_type, architecture = max(found, key=lambda pair: len(pair[0]))
            return Family(name, auto, model_type, architecture)
    return Family(name, None, None, None)


# Fields of the default config, by name; only those that a config class has are set.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": 16,
    "depth": 1,
    "num_heads": 4,
    "image_size": 32,
    "out_hidden_size": 64,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    "adapter_input_size": 64,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_model": 64,
    "output_dim": 64,
    "downsample_hidden_size": 16,
    "projection_intermediate_size": 64,
    "projector_hidden_size": 64,
    "output_proj_dims": 64,
    "index_topk": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
}

_DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]

_HYBRID = ["linear_attention", "full_attention", "linear_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": _DENSE_THEN_SPARSE},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": _DENSE_THEN_SPARSE},
        "vision_config": {"sam_config": {"output_channels": 16, "downsample_channels": [16, 64]}},
    },
    "diffusion_gemma": {"canvas_length": 8, "text_config": {"moe_intermediate_size": 32}},
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "num_key_value_heads": 4,
        "head_dim": 32,
        "mlp_layer_types": _DENSE_THEN_SPARSE,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 16],
            "mlp_layer_types": _DENSE_THEN_SPARSE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 4],
            },
        }
    },
    "gemma4": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 0,
            "qk_rope_head_dim": 0,
            "mlp_layer_types": _DENSE_THEN_SPARSE,
        }
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 4,
        "num_key_value_heads": 4,
    },
    "muse_spark": {
        "text_config": {"moe_hidden_size": 48},
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16, 16, 32, 64],
            "depths": [1, 1, 1, 1],
        },
    },
    "step3p7": {
        "text_config": {
            "pad_token_id": 1,
            "share_expert_dim": 32,
            "mlp_layer_types": _DENSE_THEN_SPARSE,
        }
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "mrope_section": [2, 3, 3],
            }
        }
    },
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "kimi_linear": {"layer_types": _HYBRID},
    "qwen3_5_moe": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen3_omni_moe": {
        "vision_start_token_id": 151652
    },  # its text path reads a field that its config lacks
    "qwen4_exp": {
        "layer_types": _HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


def small_config(family: Family, *, tied: bool | None = None) -> Any:
    """Tiny config of a family, made from its default one; embeddings tied or not, or as it is."""
    default = CONFIG_MAPPING[family.model_type]()
    fields = _small_fields(default, OVERRIDES.get(family.name, {}))
    if tied is not None:
        for part in (fields, fields.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = tied
    return type(default)(**fields)


def _small_fields(default: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(default)}
    small = {key: value for key, value in SMALL.items() if key in names}
    for key in names:
        sub = vars(default).get(key)  # getattr refuses attributes that vary by layer
        if isinstance(sub, PreTrainedConfig):
            small[key] = {
                "model_type": sub.model_type,
                **_small_fields(sub, overrides.get(key, {})),
            }
        elif key in overrides:
            small[key] = overrides[key]
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        small["num_key_value_heads"] = small[
            "num_attention_heads"
        ]  # latent attention has no groups
    return {**overrides, **small}


def write_checkpoint(
    family: Family,
    folder: Path,
    seed: int = 0,
    *,
    tied: bool | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a sharded checkpoint of random weights, with routers that spread.

    Tied embeddings, FP32 routers and the like come out as stock transformers keeps them.
    """
    torch.manual_seed(seed)
    auto = getattr(transformers, family.auto)
    first = folder / "first"
    auto.from_config(small_config(family, tied=tied), dtype=dtype).save_pretrained(first)
    model = auto.from_pretrained(first, dtype=dtype)  # casts what is kept in FP32
    shutil.rmtree(first)
    randomise(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100KB")


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Give every weight a value large enough that routing and attention are not degenerate."""
    for weight in model.parameters():
        noise = torch.randn(weight.shape)
        if weight.dim() >= 2:
            weight.copy_(noise * (1.5 / weight.shape[-1] ** 0.5))
        else:
            weight.add_((noise * 0.1).to(weight.dtype))


@dataclass
class Answers:
    """What a model says, per batch size: logits of the prompt, tokens, logits of each new one."""

    prompt: dict[int, torch.Tensor]
    tokens: dict[int, torch.Tensor]
    steps: dict[int, list[torch.Tensor]]

    def differences(self, other: Answers) -> list[str]:
        """Where the two are not bit for bit the same."""
        out = []
        for batch in self.prompt:
            if not torch.equal(self.prompt[batch], other.prompt[batch]):
                out.append(f"prompt logits, batch {batch}")
            if not torch.equal(self.tokens[batch], other.tokens[batch]):
                out.append(f"tokens, batch {batch}")
            pairs = zip(self.steps[batch], other.steps[batch], strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                out.append(f"step logits, batch {batch}")
        return out


@torch.inference_mode()
def answers(model: Any, *, new_tokens: int = 24, batches: tuple[int, ...] = (1, 4)) -> Answers:
    """Run a prompt of 7 tokens and generate greedily."""
    result = Answers({}, {}, {})
    for batch in batches:
        ids = torch.randint(2, 100, (batch, 7), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(ids)
        torch.manual_seed(0)  # a block diffusion model draws noise
        result.prompt[batch] = model(input_ids=ids, attention_mask=mask).logits
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        result.tokens[batch], result.steps[batch] = out.sequences, list(out.logits or ())
    return result
