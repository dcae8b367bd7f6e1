"""Matrices to test codecs with, as BF16 bits."""

from __future__ import annotations

import numpy as np


def bf16(values):
    """Round float32 values to BF16 bits, to nearest even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def gaussian(shape, seed=0):
    return bf16(0.02 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def row_varying(shape, seed=0):
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(0.3 * rng.standard_normal((shape[0], 1), dtype=np.float32))
    return bf16(scale * rng.standard_normal(shape, dtype=np.float32))


def student_t(shape, seed=0):
    return bf16(0.02 * np.random.default_rng(seed).standard_t(6, shape))


def random_bits(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)


def specials(shape, seed=0):
    """Zeros and subnormals of both signs, infinities, NaN with payloads, and ordinary weights."""
    rng = np.random.default_rng(seed)
    exponent = rng.choice([0, 0, 1, 120, 121, 254, 255, 255], shape).astype(np.uint16)
    return (exponent << 7) | (random_bits(shape, seed + 1) & 0x807F)


def all_equal(shape, seed=0):
    return np.full(shape, 0x3C21 + seed, dtype=np.uint16)


def all_zero(shape, seed=0):
    return np.zeros(shape, dtype=np.uint16)


KINDS = [gaussian, row_varying, student_t, random_bits, specials, all_equal, all_zero]
