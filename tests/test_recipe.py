"""Recipes: symbols agree with real tensors, both ways are exact, and what is not is refused."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import core_model_loading as ops

from zipmoe import _symbolic as symbolic
from zipmoe._errors import CheckpointError, UnsupportedModelError
from zipmoe._parts import derive_recipes
from zipmoe._proof import prove
from zipmoe.conversion import Group
from zipmoe.recipe import Matrix, Part, Recipe, _overlap, build, check_coverage, restore

# Symbols against real tensors


def evaluate(value, sources):
    """The real tensor that a symbolic one stands for."""
    out = np.full(value.shape, -1, np.int64)
    for piece in value.pieces:
        order = [axis for axis in piece.axes if axis is not None]
        source = sources[piece.tensor]
        index = [None] * source.ndim
        for axis, taken in zip(piece.axes, piece.taken, strict=True):
            if axis is not None:
                index[axis] = np.array(taken, int)
        box = source[np.ix_(*index)].transpose(order)
        box = box.reshape([len(taken) for taken in piece.taken])
        out[np.ix_(*(np.array(at, int) for at in piece.at))] = box
    assert (out >= 0).all()
    return out


def random_steps(rng, arrays):
    """Apply random operations to numpy arrays and to their symbols alike."""
    symbols = [symbolic.whole(str(n), a.shape) for n, a in enumerate(arrays)]
    if rng.random() < 0.5:
        array, value = np.stack(arrays), symbolic.stack(symbols, 0)
    else:
        array, value = np.concatenate(arrays, 1), symbolic.concatenate(symbols, 1)
    for _ in range(rng.randrange(5)):
        dim = rng.randrange(array.ndim)
        kind = rng.choice(["transpose", "take", "interleave", "deinterleave", "cat"])
        if kind == "transpose":
            other = rng.randrange(array.ndim)
            array, value = array.swapaxes(dim, other), symbolic.transpose(value, dim, other)
        elif kind == "take":
            start, step = rng.randrange(array.shape[dim]), rng.choice([1, 1, 2, 3])
            stop = rng.randrange(start + 1, array.shape[dim] + 1)
            array = array[(slice(None),) * dim + (slice(start, stop, step),)]
            value = symbolic.take(value, dim, start, stop, step)
        elif kind == "cat":
            array = np.concatenate([array, array], dim)
            value = symbolic.concatenate([value, value], dim)
        elif array.shape[dim] % 2 == 0:
            op = ops.Interleave(dim, inverse=kind == "interleave")
            real = op.convert({"a": torch.from_numpy(array.copy())}, ["a"], ["b"])
            context = symbolic.Context(["a"], ["b"], "b", None, None)
            array = real["b"].numpy()
            value = symbolic.convert([op], {"a": [value]}, context)["b"]
    return array, value


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_symbols_agree_with_real_tensors_under_any_operations(seed):
    rng = random.Random(seed)
    shape = rng.randrange(1, 7), rng.randrange(1, 9)
    arrays = [np.arange(shape[0] * shape[1]).reshape(shape) + 1000 * n for n in range(3)]
    array, value = random_steps(rng, arrays)
    assert value.shape == array.shape
    assert np.array_equal(evaluate(value, {str(n): a for n, a in enumerate(arrays)}), array)


def converter(sources, targets, operations):
    return ops.WeightConverter(sources, targets, operations)


E, I, H = 4, 6, 8  # noqa: E741 - experts, inner, hidden
CONVERSIONS = {
    "per expert, gate and up": (
        [("x.*.w1", (I, H)), ("x.*.w3", (I, H))],
        ["x.gate_up_proj"],
        [ops.MergeModulelist(0), ops.Concatenate(1)],
    ),
    "per expert, down": ([("x.*.w2", (H, I))], ["x.down_proj"], [ops.MergeModulelist(0)]),
    "fused gate and up apart": (
        [("x.gate", (E, I, H)), ("x.up", (E, I, H))], ["x.gate_up_proj"], [ops.Concatenate(1)]
    ),
    "fused and interleaved": (
        [("x.w", (E, 2 * I, H))], ["x.gate_up_proj"], [ops.Interleave(1)]
    ),
    "fused and turned": ([("x.w", (E, H, 2 * I))], ["x.gate_up_proj"], [ops.Transpose(1, 2)]),
    "text and vision in one list": (
        [("x.*.gate", (I, H)), ("x.*.up", (I, H))],
        ["text.gate_up_proj", "vision.gate_up_proj"],
        [ops.ErnieFuseAndSplitTextVisionExperts(0, 1)],
    ),
}  # fmt: skip


def example(case):
    """A group of keys, its checkpoint, and what the symbols make of it."""
    sources, targets, operations = CONVERSIONS[case]
    keys, shapes = {}, {}
    for pattern, shape in sources:
        number = 2 * E if "vision" in case else E
        names = (
            [pattern.replace("*", str(e)) for e in range(number)] if "*" in pattern else [pattern]
        )
        keys[pattern] = names
        shapes.update(dict.fromkeys(names, shape))
    group = Group(converter([p for p, _ in sources], targets, operations), keys)
    tensors = {n: SimpleNamespace(place=SimpleNamespace(shape=s)) for n, s in shapes.items()}
    values = {p: [symbolic.whole(k, shapes[k]) for k in names] for p, names in keys.items()}
    patterns = group.converter.source_patterns, group.converter.target_patterns
    model = SimpleNamespace(config=None)
    context = symbolic.Context(*patterns, targets[0], model, None)
    made = symbolic.convert(group.converter.operations, values, context)
    return group, SimpleNamespace(tensors=tensors), model, made


@pytest.mark.parametrize("case", CONVERSIONS)
def test_symbols_agree_with_transformers_own_converters(case):
    group, checkpoint, model, made = example(case)
    targets = dict(zip(made, made, strict=True))
    name = next(iter(targets))
    prove(name, group, made, targets=targets, checkpoint=checkpoint, model=model, proven=set())


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_wrong_symbol_is_caught_by_the_proof(case):
    group, checkpoint, model, made = example(case)
    first = next(iter(made))
    value = made[first]
    turned = symbolic.concatenate(  # two halves of an axis exchanged
        [symbolic.take(value, 2, 1, value.shape[2]), symbolic.take(value, 2, 0, 1)], 2
    )
    targets = dict(zip(made, made, strict=True))
    wrong = made | {first: turned}
    with pytest.raises(UnsupportedModelError, match="disagree"):
        prove(
            first, group, wrong, targets=targets, checkpoint=checkpoint, model=model, proven=set()
        )


def test_an_unknown_operation_is_refused_by_name():
    class Rotate(ops.ConversionOps):
        def convert(self, *args, **kwargs):
            raise NotImplementedError

    context = symbolic.Context(["a"], ["b"], "layer.b", None, None)
    with pytest.raises(UnsupportedModelError, match=r"layer\.b are converted by Rotate"):
        symbolic.convert([Rotate()], {"a": [symbolic.whole("a", (2, 2))]}, context)
    with pytest.raises(UnsupportedModelError, match="PermuteForRope"):
        symbolic.convert([ops.PermuteForRope()], {"a": [symbolic.whole("a", (2, 2))]}, context)


# Recipes


@pytest.mark.parametrize("case", CONVERSIONS)
def test_recipes_build_the_matrices_and_restore_the_sources(case):
    _, checkpoint, _, made = example(case)
    rng = np.random.default_rng(0)
    shapes = {key: source.place.shape for key, source in checkpoint.tensors.items()}
    sources = {key: rng.integers(0, 1 << 16, shape) for key, shape in shapes.items()}
    layers = []
    back = {key: np.full(shape, -1) for key, shape in shapes.items()}
    for number, value in enumerate(made.values()):
        halves = [
            symbolic.take(value, 1, 0, value.shape[1] // 2),
            symbolic.take(value, 1, value.shape[1] // 2, value.shape[1]),
        ]
        recipes = derive_recipes("m", number, E, halves)
        matrices = [Matrix("up", *half.shape[1:]) for half in halves]
        real = evaluate(value, sources)
        for expert in range(E):

            def fetch(key):
                return sources[key[0]] if key[1] is None else sources[key[0]][key[1]]

            built = [
                build(matrix, recipe, expert, fetch)
                for matrix, recipe in zip(matrices, recipes, strict=True)
            ]
            assert np.array_equal(np.concatenate(built), real[expert])
            shape_of = lambda key: shapes[key[0]][-2:]  # noqa: E731
            for (key, slot), piece in restore(recipes, built, expert, shape_of).items():
                back[key][... if slot is None else slot] = piece
        layers.append((E, matrices, recipes))
    check_coverage(layers, shapes)
    assert all(np.array_equal(back[key], sources[key]) for key in sources)


def test_a_recipe_survives_json():
    part = Part("x.{e}.w", range(0, 8, 2), range(4), range(1, 5), 3, fused=True, transpose=True)
    assert Part.from_json(json.loads(json.dumps(part.to_json()))) == part
    plain = Part("x", range(8), range(4), range(8))
    assert set(plain.to_json()) == {"tensor", "rows", "columns", "into"}
    assert Part.from_json(plain.to_json()) == plain


@pytest.mark.parametrize(
    "fields",
    [
        None, {}, {"tensor": 1}, {"tensor": "x", "surprise": 1},
        {"tensor": "x", "rows": [0, 8], "columns": [0, 4, 1], "into": [0, 8, 1]},
        {"tensor": "x", "rows": [0, 8, 0], "columns": [0, 4, 1], "into": [0, 8, 1]},
        {"tensor": "x", "rows": [-1, 8, 1], "columns": [0, 4, 1], "into": [0, 8, 1]},
        {"tensor": "x", "rows": [0, 8, 1], "columns": [0, 4, 1], "into": [0, 1 << 40, 1]},
        {"tensor": "x", "rows": [0, 8, 1], "columns": [0, 4, 1], "into": [0, 8, 1], "fused": 1},
        {"tensor": "x", "rows": [0, 8, True], "columns": [0, 4, 1], "into": [0, 8, 1]},
    ],
)  # fmt: skip
def test_a_malformed_part_is_refused(fields):
    with pytest.raises(ValueError, match="is not"):
        Part.from_json(fields)


def whole_layer():
    parts = (
        Part("w.{e}", range(8), range(4), range(8)),
        Part("w.{e}", range(8, 16), range(4), range(8)),
    )
    matrices = [Matrix("gate", 8, 4), Matrix("up", 8, 4)]
    return matrices, [Recipe(0, n, (part,)) for n, part in enumerate(parts)]


SHAPES = {"w.0": (16, 4), "w.1": (16, 4)}


def test_coverage_holds_for_a_whole_layer():
    matrices, recipes = whole_layer()
    check_coverage([(2, matrices, recipes)], SHAPES)


BREAKS = {
    "an expert that is not there": lambda m, r: ((3, m, r), SHAPES),
    "a source with more rows": lambda m, r: ((2, m, r), SHAPES | {"w.1": (17, 4)}),
    "a source of three dimensions": lambda m, r: ((2, m, r), SHAPES | {"w.1": (2, 16, 4)}),
    "the same rows twice": lambda m, r: ((2, m, [r[0], Recipe(0, 1, r[0].parts)]), SHAPES),
    "a matrix half filled": lambda m, r: (
        (2, [m[0], Matrix("up", 9, 4)], r), SHAPES
    ),
    "a matrix of other columns": lambda m, r: ((2, [m[0], Matrix("up", 8, 5)], r), SHAPES),
    "columns outside": lambda m, r: (
        (2, m, [r[0], Recipe(0, 1, (Part("w.{e}", range(8, 16), range(1, 5), range(8)),))]), SHAPES
    ),
    "a row filled twice": lambda m, r: (
        (2, m, [r[0], Recipe(0, 1, (
            Part("w.{e}", range(8, 12), range(4), range(4)),
            Part("w.{e}", range(12, 16), range(4), range(3, 7)),
        ))]), SHAPES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_recipes_that_are_not_exact_are_refused(case):
    layer, shapes = BREAKS[case](*whole_layer())
    with pytest.raises(ValueError, match=r"fit|fill|used|no tensor|leaves"):
        check_coverage([layer], shapes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(*[st.builds(range, st.integers(0, 30), st.integers(0, 60), st.integers(1, 9))] * 2)
def test_ranges_overlap_exactly_if_they_share_a_number(a, b):
    assert _overlap(a, b) == bool(set(a) & set(b))


def test_a_slice_of_an_expert_belongs_to_one_layer():
    gate = Recipe(0, 0, (Part("w", range(8), range(4), range(8), fused=True),))
    up = Recipe(1, 0, (Part("w", range(8, 16), range(4), range(8), fused=True),))
    matrix = [Matrix("up", 8, 4)]
    with pytest.raises(ValueError, match="two layers"):
        check_coverage([(2, matrix, [gate]), (2, matrix, [up])], {"w": (2, 16, 4)})


def test_experts_that_are_not_numbered_one_after_the_other_are_refused():
    tensors = [symbolic.whole(f"x.{n}.w", (4, 4)) for n in (0, 1, 3)]
    with pytest.raises(CheckpointError, match=r"should come from x\.2\.w"):
        derive_recipes("m", 0, 3, [symbolic.stack(tensors, 0)])
    tensors = [symbolic.whole(name, (4, 4)) for name in ("a.w", "b.w")]
    with pytest.raises(UnsupportedModelError, match="do not number"):
        derive_recipes("m", 0, 2, [symbolic.stack(tensors, 0)])


def test_experts_numbered_from_another_number_keep_their_names():
    tensors = [symbolic.whole(f"layers.3.x.{n}.w2", (4, 4)) for n in (64, 65, 66)]
    (recipe,) = derive_recipes("m", 0, 3, [symbolic.stack(tensors, 0)])
    assert recipe.parts[0].to_json() == {
        "tensor": "layers.3.x.{e}.w2",
        "expert_offset": 64,
        "rows": [0, 4, 1],
        "columns": [0, 4, 1],
        "into": [0, 4, 1],
    }


def test_one_fused_tensor_of_experts_along_another_dimension_is_refused():
    value = symbolic.transpose(symbolic.whole("w", (4, 3, 5)), 0, 1)
    with pytest.raises(UnsupportedModelError, match="first dimension"):
        derive_recipes("m", 0, 3, [value])
