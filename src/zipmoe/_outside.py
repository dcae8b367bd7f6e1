"""Families whose native bits depend on more than a token's own past."""

# Written by tools/generate_families.py from the sweep in tests/; do not edit.
OUTSIDE = {
    "axk2": ("padding",),
    "deepseek_v32": ("padding",),
    "diffusion_gemma": ("batch", "cuts", "padding"),
    "dots3_note": ("padding",),
    "glm5_next": ("cuts", "padding"),
    "glm_moe_dsa": ("padding",),
    "granitemoehybrid": ("cuts",),
    "hy_v4": ("padding",),
    "jamba": ("cuts",),
    "kimi_linear": ("padding",),
    "minimax": ("cuts",),
    "mistral_large4": ("padding",),
    "nemotron_h": ("cuts",),
    "qwen3_5_moe": ("cuts", "padding"),
    "qwen3_next": ("cuts", "padding"),
    "qwen4_exp": ("cuts", "padding"),
}
