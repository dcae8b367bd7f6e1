"""Flipped bits and cut files: no token ever comes from unverified bytes."""

import random

import pytest
import xxhash
from test_store import swap_experts_and_entries
from test_store_damage import CUTS, FLIPS, chosen, count_cuts, flip

from zipmoe._errors import StoreError
from zipmoe.store import open_store

PROMPT = [[5, 17]]
NEW_TOKENS = 3


def note_visits(model, seen):
    """Have the experts modules of a model note which experts their router chose."""

    def note(module, arguments):
        layer = module.down_proj.layer.ordinal
        seen.update((layer, expert) for expert in arguments[1].unique().tolist())

    for module in model.modules():
        if hasattr(module, "has_gate"):
            module.register_forward_pre_hook(note)


def answer(folder):
    """Tokens of a fixed prompt, and which experts they took."""
    import torch  # noqa: PLC0415

    from zipmoe.model import load  # noqa: PLC0415

    with load(folder, memory="8GB") as loaded:
        seen = set()
        note_visits(loaded.model, seen)
        ids = torch.tensor(PROMPT)
        out = loaded.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[0].tolist(), seen


def unread(folder, seen):
    """Byte ranges of expert shards that an answer with these experts has no need of, by file."""
    ranges = {}
    with open_store(folder) as store:
        for layer, expert, shard, rows in store.expert_records():
            if (layer, expert) in seen:
                continue
            extents = shard.entries[rows]["extents"][:, :2, :2].astype(int)
            ends = [offset + -(-length // 4096) * 4096 for offset, length in extents.reshape(-1, 2)]
            start, end = extents[0, 0, 0], max(ends)
            ranges.setdefault(shard.info.name, []).append((start, end))
    return ranges


def outcome(folder, expected):
    """Whether the damaged store is refused; if not, the answer must be the sound store's."""
    try:
        tokens, _ = answer(folder)
    except StoreError:
        return True
    assert tokens == expected
    return False


def count_flips(folder, rng, flips):
    """Returns how many flips touched what is read, and how many of those were refused."""
    expected, seen = answer(folder)
    spared = unread(folder, seen)
    assert spared, "the prompt visits every expert: nothing is left that need not be read"
    files = sorted(folder.iterdir())
    touched = refused = 0
    for number in range(flips):
        path = chosen(files, rng, number)
        bit = rng.randrange(8 * path.stat().st_size)
        needless = any(a <= bit // 8 < b for a, b in spared.get(path.name, ()))
        flip(path, bit)
        was_refused = outcome(folder, expected)
        flip(path, bit)
        touched += not needless
        refused += was_refused and not needless
    assert answer(folder)[0] == expected
    return touched, refused


def count_refused_cuts(folder, rng, cuts):
    """Every cut changes a length, so that every one must be refused."""
    expected, _ = answer(folder)
    return count_cuts(folder, rng, cuts, lambda damaged, _: outcome(damaged, expected))


def test_flipped_bits_and_cut_files_are_refused_by_generate(store_copy):
    folder = store_copy("qwen2_moe", num_experts=24)
    touched, refused = count_flips(folder, random.Random(1), 8)
    assert touched == refused > 0
    assert count_refused_cuts(folder, random.Random(2), 4) == 4


@pytest.mark.soak
def test_all_flipped_bits_and_cut_files_are_refused_by_generate(store_copy, soak_record):
    folder = store_copy("qwen2_moe", num_experts=24)
    rng = random.Random(soak_record.seed)
    touched, refused = count_flips(folder, rng, FLIPS)
    soak_record("bit flips refused by generate", flips=FLIPS, touched=touched, refused=refused)
    cut = count_refused_cuts(folder, rng, CUTS)
    soak_record("truncations refused by generate", truncations=CUTS, refused=cut)
    assert (touched, cut) == (refused, CUTS)


def logits(folder):
    import torch  # noqa: PLC0415

    from zipmoe.model import load  # noqa: PLC0415

    with load(folder, memory="8GB") as loaded, torch.no_grad():
        return loaded.model(torch.arange(32)[None]).logits


def test_two_swapped_experts_are_refused_and_change_the_logits_when_forced(store_copy):
    import torch  # noqa: PLC0415

    folder = store_copy("mixtral", codec="raw")
    sound = logits(folder)
    before, after = swap_experts_and_entries(folder)
    with pytest.raises(StoreError, match="index does not have its checksum"):
        logits(folder)
    manifest = folder / "zipmoe.json"
    body, end = manifest.read_text().replace(before, after).split(',\n "xxh3": "')
    manifest.write_text(f'{body},\n "xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}"{end[17:]}')
    assert not torch.equal(logits(folder), sound)
    swap_experts_and_entries(folder)  # and back, under the forged manifest: the index is another
    with pytest.raises(StoreError, match="index does not have its checksum"):
        logits(folder)
