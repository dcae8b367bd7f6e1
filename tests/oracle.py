"""A second reader of the store format, in plain numpy, written from docs/format.md alone.

It shares no code with src. Slow and simple on purpose: where it and zipmoe disagree, one of them
or the document is wrong. Section numbers are those of the document. Anything odd is an
AssertionError.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import lz4.block
import numpy as np
import xxhash
import zstandard

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
CODECS = {0: "raw", 1: "rank223", 2: "rank3", 3: "rank4", 4: "zstd", 5: "lz4hc"}  # section 7
CODECS |= {6: "int8", 7: "int4", 8: "int2"}
DTYPES = {  # section 8: id → name, bytes
    1: ("BF16", 2), 2: ("F16", 2), 3: ("F32", 4), 4: ("F64", 8), 5: ("F8_E4M3", 1),
    6: ("F8_E5M2", 1), 7: ("I8", 1), 8: ("I16", 2), 9: ("I32", 4), 10: ("I64", 8),
    11: ("U8", 1), 12: ("U16", 2), 13: ("U32", 4), 14: ("U64", 8), 15: ("BOOL", 1),
}  # fmt: skip
NAMES = dict(DTYPES.values())
ROLES = {0: "gate", 1: "up", 2: "down", 3: "dense"}
# Section 6: weight w of a group stands at this byte.
LANE = np.array([16 * ((w >> 3) & 3) + 8 * (w >> 5) + (w & 7) for w in range(64)])


def ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# Section 3: shards


def read_shard(path: Path):
    """Bytes of the file, tensors in file order [(name, start, stop)], bytes before the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "zipmoe", "format_version": "1.0"}
    start = 8 + length
    assert start % PAGE == 0
    tensors = []
    end = 0
    for name, entry in header.items():
        assert entry["dtype"] == "U8"
        assert len(entry["shape"]) == 1
        first, last = entry["data_offsets"]
        assert first == end
        assert last - first == entry["shape"][0]
        tensors.append((name, start + first, start + last))
        end = last
    assert start + end == len(data)
    assert tensors[-1][0] == "zipmoe.index"
    return data, tensors, start


# Section 4: the index


def read_index(data: bytes):
    assert data[:8] == b"ZIPMOEIX"
    assert struct.unpack("<HHI", data[8:16]) == (0, 1, 128)
    count, records = struct.unpack("<QQ", data[16:32])
    assert data[32:64] == bytes(32)
    assert len(data) == 64 + 128 * count + 8
    assert struct.unpack("<Q", data[-8:])[0] == xxhash.xxh3_64_intdigest(data[:-8])
    entries = []
    for at in range(64, 64 + 128 * count, 128):
        names = "record matrix dtype flags layer expert codec layout rows columns R T role reserved"
        values = struct.unpack("<IHBBIIHHIIIIIQ", data[at : at + 48])
        entry = dict(zip(names.split(), values, strict=True))
        planes = struct.unpack("<9Q", data[at + 48 : at + 120])
        entry["extents"] = [planes[0:3], planes[3:6]]
        assert planes[6:] == (0, 0, 0)
        assert entry["flags"] == entry["reserved"] == 0
        assert data[at + 120 : at + 128] == bytes(8)
        assert entry["layout"] == 1
        entries.append(entry)
    keys = [(entry["record"], entry["matrix"]) for entry in entries]
    assert keys == sorted(set(keys))
    assert len({record for record, _ in keys}) == records
    return entries


def extents_of(data: bytes, entry, start: int):
    """The two extents, checked; and where the second ends."""
    planes = []
    for offset, length, checksum in entry["extents"]:
        assert offset == start
        assert offset % PAGE == 0
        padded = data[offset : offset + ceil(length, PAGE)]
        assert len(padded) == ceil(length, PAGE)
        assert not any(padded[length:])
        assert checksum == (xxhash.xxh3_64_intdigest(padded) if length else 0)
        planes.append(padded[:length])
        start = offset + ceil(length, PAGE)
    return planes, start


# Section 5: blocks


def blocks_of(rows: int, columns: int, R: int, T: int):  # noqa: N803 - the document's names
    """(first row, first column, height, width) of each block, in order."""
    assert R % 4 == 0
    assert T % 64 == 0
    assert 0 < R * T <= 8192
    found = []
    for top in range(0, rows, R):
        for left in range(0, columns, T):
            height = min(R, ceil(rows - top, 4))
            found.append((top, left, height, min(T, ceil(columns - left, 64))))
    return found if columns else []


def place(block_bytes, height, width):
    """Bytes of a block in stored order → [height, width]."""
    groups = block_bytes.reshape(height // 4, width // 64, 4, 64)[..., LANE]
    return groups.transpose(0, 2, 1, 3).reshape(height, width)


# Section 7.1: code groups


def codes2(data):
    data = np.frombuffer(data, np.uint8).reshape(-1, 16)
    return np.concatenate([(data >> (2 * q)) & 3 for q in range(4)], axis=1).reshape(-1)


def codes3(data):
    data = np.frombuffer(data, np.uint8).reshape(-1, 24)
    low = codes2(data[:, :16].tobytes()).reshape(-1, 64)
    high = np.unpackbits(data[:, 16:], axis=1, bitorder="little")
    return (low | (high << 2)).reshape(-1)


def codes4(data):
    data = np.frombuffer(data, np.uint8).reshape(-1, 32)
    return np.concatenate([data & 15, data >> 4], axis=1).reshape(-1)


# Section 7.2: rank codecs

RANK = {"rank223": (16, 16, codes2), "rank3": (24, 8, codes3), "rank4": (32, 16, codes4)}


def rank_exponents(codec, extent, blocks):
    group_bytes, table_bytes, decode = RANK[codec]
    if not blocks:
        assert extent == b""
        return []
    groups = [height * width // 64 for _, _, height, width in blocks]
    tables_at = ceil(group_bytes * sum(groups), 64)
    offsets_at = ceil(tables_at + table_bytes * len(blocks), 64)
    variable_at = ceil(offsets_at + 4 * (len(blocks) + 1), 64)
    offsets = np.frombuffer(extent[offsets_at : offsets_at + 4 * (len(blocks) + 1)], "<u4")
    assert offsets[0] == 0
    assert len(extent) == variable_at + offsets[-1] + 64
    for start, stop in (
        (group_bytes * sum(groups), tables_at),
        (tables_at + table_bytes * len(blocks), offsets_at),
        (offsets_at + 4 * (len(blocks) + 1), variable_at),
        (len(extent) - 64, len(extent)),
    ):
        assert not any(extent[start:stop])
    found = []
    at = 0
    for number, count in enumerate(groups):
        codes = decode(extent[at : at + group_bytes * count])
        at += group_bytes * count
        table = extent[tables_at + table_bytes * number :][:table_bytes]
        variable = extent[variable_at + offsets[number] : variable_at + offsets[number + 1]]
        expand = nested if codec == "rank223" else escaped
        found.append(expand(codes, np.frombuffer(table, np.uint8), variable))
    return found


def smallest_absent(entries):
    return min(set(range(256)) - {int(value) for value in entries})


def escaped(codes, table, variable):
    assert table[-1] == smallest_absent(table[:-1])
    values = table[codes]
    escapes = codes == len(table) - 1
    assert len(variable) == escapes.sum()
    values[escapes] = np.frombuffer(variable, np.uint8)
    return values


def nested(codes, table, variable):
    for level in (table[0:4], table[4:8], table[8:16]):
        assert level[-1] == smallest_absent(level[:-1])
    n2, n3 = struct.unpack("<HH", variable[:4])
    end2 = 4 + 16 * (ceil(n2, 64) // 64)
    end3 = end2 + 24 * (ceil(n3, 64) // 64)
    second, third = codes2(variable[4:end2]), codes3(variable[end2:end3])
    assert not second[n2:].any()
    assert not third[n3:].any()
    second, third = second[:n2], third[:n3]
    assert (codes == 3).sum() == n2
    assert (second == 3).sum() == n3
    assert (third == 7).sum() == len(variable) - end3
    deepest = table[8:16][third]
    deepest[third == 7] = np.frombuffer(variable[end3:], np.uint8)
    deeper = table[4:8][second]
    deeper[second == 3] = deepest
    values = table[0:4][codes]
    values[codes == 3] = deeper
    return values


# Section 7.3: zstd and lz4hc


def sharded_exponents(codec, extent, total):
    if not total:
        assert extent == b""
        return np.zeros(0, np.uint8)
    (n, reserved) = struct.unpack("<II", extent[:8])
    assert 1 <= n <= 64
    assert reserved == 0
    sizes = [struct.unpack("<II", extent[8 + 8 * i : 16 + 8 * i]) for i in range(n)]
    at = ceil(8 + 8 * n, 64)
    assert not any(extent[8 + 8 * n : at])
    planes = []
    for number, (plane_bytes, data_bytes) in enumerate(sizes):
        assert plane_bytes % 64 == 0 or number == n - 1
        data = extent[at : at + data_bytes]
        if codec == "zstd":
            plane = zstandard.ZstdDecompressor().decompress(data, max_output_size=plane_bytes)
        else:
            plane = lz4.block.decompress(data, uncompressed_size=plane_bytes)
        assert len(plane) == plane_bytes
        planes.append(plane)
        at += data_bytes
        if number < n - 1:
            assert not any(extent[at : ceil(at, 64)])
            at = ceil(at, 64)
    assert at == len(extent)
    return np.frombuffer(b"".join(planes), np.uint8)


# Section 7.4: int8, int4 and int2

BITS = {"int8": 8, "int4": 4, "int2": 2}


def integers_of(codec, data, blocks):
    """The integers of each block, [height, width]."""
    bits = BITS[codec]
    found, at = [], 0
    for _, _, height, width in blocks:
        codes = np.frombuffer(data[at : at + height * width * bits // 8], np.uint8)
        at += codes.size
        if bits == 8:
            found.append(place(codes, height, width).view(np.int8).astype(int))
            continue
        words = codes.view("<u2").reshape(height // 4, width // 64, -1, 32)  # units of 64 bytes
        fields = np.stack([(words >> shift) & (2**bits - 1) for shift in range(0, 16, bits)], 3)
        # Unit, then field, count the halves of rows 0 to 3.
        rows = fields.reshape(height // 4, width // 64, 4, 64).astype(int)
        signed = np.where(rows < 2 ** (bits - 1), rows, rows - 2**bits)
        integers = signed.transpose(0, 2, 1, 3).reshape(height, width)
        found.append(2 * integers + 1 if bits == 2 else integers)
    assert at == len(data)
    return found


def scaled(codec, extents, rows, columns, geometry):
    """[rows, columns] of BF16: each integer times its scale, rounded to nearest even."""
    blocks = blocks_of(rows, columns, *geometry)
    scales = (np.frombuffer(extents[1], "<u2").astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(scales).all()
    assert not np.signbit(scales).any()
    out = np.zeros((rows, columns), np.uint16)
    by_row = len(scales) == ceil(rows, 4)
    at = 0
    for block, (top, left, height, width) in zip(
        integers_of(codec, extents[0], blocks), blocks, strict=True
    ):
        if by_row:
            own = np.repeat(scales[top : top + height, None], width, axis=1)
        else:
            part = scales[at : at + height * width // 64].reshape(height // 4, width // 64, 4)
            at += height * width // 64
            own = np.repeat(part.transpose(0, 2, 1).reshape(height, width // 64), 64, axis=1)
        bits = np.ascontiguousarray(block * own, np.float32).view(np.uint32)
        words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        out[top : top + height, left : left + width] = words[: rows - top, : columns - left]
        outside = np.ones_like(block, bool)
        outside[: rows - top, : columns - left] = False
        assert (block[outside] == (1 if codec == "int2" else 0)).all()  # padding: code 0
    assert by_row or at == len(scales)
    return out


def decode_matrix(codec, extents, rows, columns, geometry, item_bytes=2):
    """[rows, columns] of item_bytes-wide words."""
    if codec == "raw":
        assert extents[1] == b""
        assert geometry == (0, 0)
        return np.frombuffer(extents[0], f"<u{item_bytes}").reshape(rows, columns)
    if codec in BITS:
        return scaled(codec, extents, rows, columns, geometry)
    blocks = blocks_of(rows, columns, *geometry)
    sizes = [height * width for _, _, height, width in blocks]
    signs = np.frombuffer(extents[0], np.uint8)
    assert len(signs) == sum(sizes)
    if codec in RANK:
        exponents = rank_exponents(codec, extents[1], blocks)
    else:
        plane = sharded_exponents(codec, extents[1], sum(sizes))
        exponents = np.split(plane, np.cumsum(sizes)[:-1]) if sizes else []
    out = np.zeros((rows, columns), np.uint16)
    at = 0
    for (top, left, height, width), exponent in zip(blocks, exponents, strict=True):
        sign = signs[at : at + height * width].astype(np.uint16)
        at += height * width
        words = ((sign & 1) << 15) | (exponent.astype(np.uint16) << 7) | (sign >> 1)
        block = place(words, height, width)
        inside = block[: rows - top, : columns - left]
        out[top : top + height, left : left + width] = inside
        outside = np.ones_like(block, bool)
        outside[: rows - top, : columns - left] = False
        assert not place(sign, height, width)[outside].any()  # padding
    return out


# Sections 10 and 11: the whole store


def read_manifest(folder: Path):
    data = (folder / "zipmoe.json").read_bytes()
    body, tail = data[:-32], data[-32:]
    assert tail == f',\n "xxh3": "{xxhash.xxh3_64_hexdigest(body)}"\n}}\n'.encode()
    manifest = json.loads(data)
    assert manifest["format"] == "zipmoe"
    assert manifest["format_version"] == ("1.1" if "lossy" in manifest else "1.0")
    return manifest


def read_store(folder: Path):
    """All matrices: experts {(layer, expert, role): array}, dense {key: (array, dtype name)}."""
    manifest = read_manifest(folder)
    experts, dense = {}, {}
    for shard in manifest["shards"]:
        data, tensors, start = read_shard(folder / shard["name"])
        assert len(data) == shard["bytes"]
        assert f"{xxhash.xxh3_64_intdigest(data[:start]):016x}" == shard["header_xxh3"]
        index = data[tensors[-1][1] : tensors[-1][2]]
        assert f"{struct.unpack('<Q', index[-8:])[0]:016x}" == shard["index_xxh3"]
        at = start
        for entry in read_index(index):
            name, first, last = tensors[entry["record"]]
            if entry["matrix"] == 0:
                assert at == first
            extents, at = extents_of(data, entry, at)
            assert at <= last
            dtype, item_bytes = DTYPES[entry["dtype"]]
            shape = entry["rows"], entry["columns"]
            geometry = entry["R"], entry["T"]
            matrix = decode_matrix(CODECS[entry["codec"]], extents, *shape, geometry, item_bytes)
            if shard["kind"] == "dense":
                assert (entry["layer"], entry["expert"]) == (0xFFFFFFFF, 0xFFFFFFFF)
                assert ROLES[entry["role"]] == "dense"
                dense[name] = matrix, dtype
            else:
                module = manifest["layers"][entry["layer"]]["module"]
                assert name == f"{module}.{entry['expert']}"
                experts[entry["layer"], entry["expert"], ROLES[entry["role"]]] = matrix
                bits = BITS.get(CODECS[entry["codec"]], 16)
                said = manifest["lossy"]["bits"] if "lossy" in manifest else None
                assert bits == (said[entry["layer"]][entry["expert"]] if said else 16)
    return manifest, experts, dense


def restore_tensors(folder: Path):
    """Every tensor of the checkpoint as bytes, by key, put together by the recipes."""
    manifest, experts, dense = read_store(folder)
    source = json.loads((folder / "source.json").read_bytes())
    shapes = {}
    for file in source["files"]:
        for key, entry in json.loads(file.get("header", "{}")).items():
            if key != "__metadata__":
                shapes[key] = entry["shape"], NAMES[entry["dtype"]]
    found = {}
    for recipe in source["recipes"]:
        layer = manifest["layers"][recipe["layer"]]
        role = layer["matrices"][recipe["matrix"]]["role"]
        for expert in range(layer["experts"]):
            for part in recipe["parts"]:
                number = expert + part.get("expert_offset", 0)
                key = part["tensor"].replace("{e}", str(number))
                if key not in found:
                    shape, item_bytes = shapes[key]
                    found[key] = np.zeros(shape, f"<u{item_bytes}")
                target = found[key][number] if part.get("fused") else found[key]
                piece = experts[recipe["layer"], expert, role][slice(*part["into"])]
                piece = piece.T if part.get("transpose") else piece
                target[slice(*part["rows"]), slice(*part["columns"])] = piece
    for key, (matrix, _) in dense.items():
        assert key not in found
        found[key] = matrix
    assert found.keys() == shapes.keys()
    return {key: value.tobytes() for key, value in found.items()}
