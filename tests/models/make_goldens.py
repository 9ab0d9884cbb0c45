"""Writes goldens.npz: what transformers' torch models answer for the models of families.py.

    python tests/models/make_goldens.py        (needs torch)

For each family NAME the file holds NAME/config (its config.json), NAME/tokens [1, 48] and
NAME/logits [1, 48, 64] float32; weights follow from the recipe in families.py with the seed in
"seed".
"""

import json
import pathlib
import tempfile

import numpy as np
from families import FAMILIES, tokens, weights, write_folder

GOLDENS = pathlib.Path(__file__).parent / "goldens.npz"
SEED, LENGTH = 11, 48


def torch_logits(folder, tokens_BxT):
    """Logits of the folder's own model in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens_BxT, np.int64))).logits.numpy()


def main():
    out = {"seed": np.array(SEED)}
    for name, raw in FAMILIES.items():
        tokens_BxT = tokens(raw, 1, LENGTH, SEED)
        with tempfile.TemporaryDirectory() as folder:
            write_folder(pathlib.Path(folder), raw, weights(raw, SEED))
            out[f"{name}/logits"] = torch_logits(folder, tokens_BxT)
        out[f"{name}/tokens"] = tokens_BxT
        out[f"{name}/config"] = np.array(json.dumps(raw, sort_keys=True))
    np.savez_compressed(GOLDENS, **out)
    print(f"{GOLDENS}: {len(FAMILIES)} families, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
