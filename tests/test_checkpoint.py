"""Checkpoints that cannot be packed are refused by name; nothing is guessed."""

import json
import os
import shutil
import struct

import pytest

from zipmoe._errors import CheckpointError, UnsupportedModelError
from zipmoe.checkpoint import open_checkpoint
from zipmoe.conversion import REFUSED_FAMILIES, plan_model
from zipmoe.pack import pack_checkpoint
from zipmoe.store import open_store
from zipmoe.unpack import unpack_store
from zipmoe.verify import verify_store


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """Give a function: family and options → a copy of the checkpoint, yours to damage."""

    def make(family="mixtral", **options):
        return shutil.copytree(tiny_checkpoint(family, **options), tmp_path / "checkpoint")

    return make


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


METHODS = ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes", "compressed-tensors"]


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_is_refused_and_its_method_named(method, copy):
    folder = copy()
    quantised = {"quantization_config": {"quant_method": method}}
    edit_json(folder / "config.json", lambda c: c.update(quantised))
    with pytest.raises(UnsupportedModelError, match=f"already quantised by {method}"):
        pack_checkpoint(folder, folder.parent / "s")


def test_a_quantised_part_of_a_checkpoint_is_refused_too(copy):
    folder = copy()
    part = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    edit_json(folder / "config.json", lambda c: c.update(part))
    with pytest.raises(UnsupportedModelError, match="fp8"):
        open_checkpoint(folder)


def test_a_store_is_refused_as_a_checkpoint(tiny_store, tmp_path):
    with pytest.raises(CheckpointError, match="zipmoe store already"):
        pack_checkpoint(tiny_store("mixtral"), tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", "pickled .bin"), ("m.gguf", "GGUF"), ("model.pth", "pickled .pt")],
)
def test_other_weight_formats_are_refused_by_name(name, said, copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsupportedModelError, match=said):
        open_checkpoint(folder)


def test_a_gguf_file_is_refused_by_name(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        pack_checkpoint(tmp_path / "m.gguf", tmp_path / "s")


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_families_without_a_path_are_refused_and_told_what_works(family, copy):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(model_type=family))
    with pytest.raises(UnsupportedModelError, match=f"{family} is not supported.*mixtral"):
        pack_checkpoint(folder, folder.parent / "s")


def test_a_dense_model_is_refused(copy):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(model_type="llama"))
    with pytest.raises(UnsupportedModelError, match="llama model without routed experts"):
        pack_checkpoint(folder, folder.parent / "s")


def test_code_that_comes_with_a_checkpoint_is_never_run(copy):
    folder = copy()
    trap = folder.parent / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(trap)!r}, 'w')\n")
    custom = {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.XConfig"}}
    edit_json(folder / "config.json", lambda c: c.update(custom))
    with pytest.raises(UnsupportedModelError, match="does not run code that comes"):
        pack_checkpoint(folder, folder.parent / "s")
    assert not trap.exists()


def test_a_config_that_breaks_the_models_code_is_refused(copy):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(hidden_size=-4))
    with pytest.raises(CheckpointError, match=r"cannot build|does not run code|has shape"):
        pack_checkpoint(folder, folder.parent / "s")


def test_numbers_too_long_to_read_are_refused(copy):
    folder = copy()
    (folder / "config.json").write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match="not usable JSON"):
        open_checkpoint(folder)


# Headers


def write_shard(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(start, stop, dtype="U8", shape=None):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "gap": ({"a": tensor(0, 4), "b": tensor(5, 8)}, "gap or overlap"),
    "overlap": ({"a": tensor(0, 4), "b": tensor(3, 8)}, "gap or overlap"),
    "not from 0": ({"a": tensor(1, 8)}, "gap or overlap"),
    "past the end": ({"a": tensor(0, 9)}, "tensors end at"),
    "before the end": ({"a": tensor(0, 7)}, "tensors end at"),
    "backwards": ({"a": tensor(8, 0, shape=[0])}, "data_offsets say -8"),
    "unknown dtype": ({"a": tensor(0, 8, "I3")}, "unknown dtype 'I3'"),
    "wrong shape": ({"a": tensor(0, 8, "F32", [3])}, "takes 12 bytes"),
    "negative shape": ({"a": tensor(0, 8, "F32", [-1, -2])}, "impossible shape"),
    "overflowing shape": ({"a": tensor(0, 8, "F32", [1 << 61, 8])}, "takes"),
    "not a number": ({"a": tensor(0, 8, "F32", [2.0])}, "impossible shape"),
    "extra field": ({"a": tensor(0, 8) | {"x": 1}}, "exactly dtype"),
    "not an object": ([], "not a JSON object"),
    "twice": (b'{"a":1,"a":1}', "'a' occurs twice"),
    "no JSON": (b"{", "not JSON"),
    "no UTF-8": (b'{"\xff":1}', "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "reserved name": ({"zipmoe.index": tensor(0, 8)}, "reserved"),
    "placeholder": ({"experts.{e}.w": tensor(0, 8)}, "reserved"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_breaks_a_rule_is_refused(case, copy):
    header, said = HEADERS[case]
    folder = copy()
    write_shard(folder / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too few"),
        (bytes(7), "too few"),
        (struct.pack("<Q", 1 << 63), "over the limit"),
        (struct.pack("<Q", 100_000_001), "over the limit"),
        (struct.pack("<Q", 99_999_999), "does not fit"),
    ],
)
def test_a_header_length_is_checked_before_it_is_used(data, said, copy):
    folder = copy()
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


# Files


def test_missing_shards_are_named(copy):
    folder = copy(shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{gone[0].name}, {gone[1].name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".x.safetensors", "x.bin"])
def test_path_tricks_in_the_index_are_refused(name, copy):
    folder = copy(shard_size="100KB")
    path = folder / "model.safetensors.index.json"
    edit_json(path, lambda c: c["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="plain name"):
        open_checkpoint(folder)


def test_an_index_that_promises_a_tensor_no_shard_holds_is_refused(copy):
    folder = copy(shard_size="100KB")
    shard = min(folder.glob("*.safetensors")).name
    path = folder / "model.safetensors.index.json"
    edit_json(path, lambda c: c["weight_map"].update({"nobody": shard}))
    with pytest.raises(CheckpointError, match=f"'nobody' in {shard}"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(copy):
    folder = copy(shard_size="100KB")
    one, two, *_ = sorted(folder.glob("*.safetensors"))
    shutil.copy(one, two)
    with pytest.raises(CheckpointError, match="both in"):
        open_checkpoint(folder)


def test_links_out_of_the_folder_are_refused_and_a_hub_cache_is_not(copy, tmp_path):
    folder = copy()
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert "config.json" in {file.name for file in open_checkpoint(snapshot).small_files}
    pack_checkpoint(snapshot, tmp_path / "s")
    assert not verify_store(tmp_path / "s").errors
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        open_checkpoint(snapshot)


def test_a_pipe_in_the_folder_is_refused_and_not_read(copy):
    folder = copy()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["zipmoe.json", "source.json", "experts-00001.safetensors"])
def test_a_file_whose_name_a_store_needs_is_refused(name, copy):
    folder = copy()
    (folder / name).write_text("x")
    if name.endswith(".json"):
        with pytest.raises(CheckpointError, match="needs for itself"):
            pack_checkpoint(folder, folder.parent / "s")
    else:  # weights that the index does not name are left out
        assert name in open_checkpoint(folder).left_out


def test_no_config_or_a_broken_one_is_refused(copy):
    folder = copy()
    for text, said in (
        ("{", "not usable JSON"),
        ("[]", "not a JSON object"),
        ('{"a":1,"a":2}', "twice"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(folder / "nowhere")


# The model's demands


def without(folder, name):
    """Rewrite the single shard without a tensor."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end, parts, kept = 0, [], {}
    for key, entry in header.items():
        if key in ("__metadata__", name):
            continue
        start, stop = entry["data_offsets"]
        parts.append(data[8 + length + start : 8 + length + stop])
        kept[key] = entry | {"data_offsets": [end, end + stop - start]}
        end += stop - start
    write_shard(path, kept, b"".join(parts))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1.w1", "do not fit together"),
        ("3.w3", "do not fit together"),
        ("0.w2", "has shape"),
        ("2.w2", "has shape"),
    ],
)
def test_a_missing_expert_is_refused(name, said, copy):
    folder = copy()
    without(folder, f"model.layers.1.block_sparse_moe.experts.{name}.weight")
    with pytest.raises(CheckpointError, match=said):
        plan_model(open_checkpoint(folder))


def test_missing_experts_of_a_layer_are_refused(copy):
    folder = copy("granitemoe")
    without(folder, "model.layers.1.block_sparse_moe.output_linear.weight")
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1.*down_proj"):
        plan_model(open_checkpoint(folder))


def test_a_config_of_another_shape_is_refused(copy):
    folder = copy()
    edit_json(folder / "config.json", lambda c: c.update(intermediate_size=128))
    with pytest.raises(CheckpointError, match="has shape"):
        plan_model(open_checkpoint(folder))


def test_tensors_that_the_model_does_not_know_are_kept_exactly(copy, tmp_path):
    folder = copy()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["model.layers.61.extra.weight"] = tensor(end, end + 24, "I64", [3])
    header["model.layers.61.empty"] = tensor(end + 24, end + 24, "BF16", [0, 5])
    header["scalar"] = tensor(end + 24, end + 28, "F32", [])
    write_shard(path, header, data[8 + length :] + bytes(range(28)))
    pack_checkpoint(folder, tmp_path / "s")
    with open_store(tmp_path / "s") as store:
        assert store.read_dense("model.layers.61.extra.weight").tobytes() == bytes(range(24))
        assert store.read_dense("model.layers.61.empty").shape == (0, 5)
        assert store.read_dense("scalar").shape == ()
    unpack_store(tmp_path / "s", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == path.read_bytes()
