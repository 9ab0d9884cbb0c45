"""Checkpoints of any geometry with made-up weights, written without holding them in memory."""

import json
import math
import pathlib

import numpy as np

from specjax.files import replacing, write_text
from specjax.models.config import ModelConfig, config_to_hf
from specjax.models.hf import tensor_shapes

_NAMES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}


def write_checkpoint(
    folder, config: ModelConfig, dtype: str = "bfloat16", shards: int = 4, sparse: bool = False
) -> int:
    """Writes config.json, an index and shards; returns the weights' bytes.

    Args:
      folder: made where needed.
      shards: files, with about as many bytes each.
      sparse: all weights zero, and no disk is taken where the file system knows holes; else small
        numbers from one block, over and over.
    """
    folder = pathlib.Path(folder)
    kind, width = _NAMES[dtype]
    sizes = {name: width * math.prod(shape) for name, shape in tensor_shapes(config).items()}
    total, parts, filled = sum(sizes.values()), [{} for _ in range(shards)], 0
    for name, size in sizes.items():
        parts[filled * shards // total][name] = size
        filled += size
    where = {}
    for i, part in enumerate(parts, start=1):
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        where |= dict.fromkeys(part, name)
        _write_shard(folder / name, part, tensor_shapes(config), kind, sparse)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_text(folder / "model.safetensors.index.json", json.dumps(index) + "\n")
    write_text(folder / "config.json", json.dumps(config_to_hf(config, dtype)) + "\n")
    return total


def _write_shard(path, sizes, shapes, kind: str, sparse: bool):
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {
            "dtype": kind, "shape": shapes[name], "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Random mantissas below exponents that both dtypes read as numbers of about 0.01.
    block = np.random.default_rng(0).integers(0x3C00, 0x3C80, 1 << 20, np.uint16).tobytes()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(file.tell() + offset)
            return
        for start in range(0, offset, len(block)):
            file.write(block[: min(len(block), offset - start)])
