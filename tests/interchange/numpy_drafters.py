"""Independent readers of drafter folders: safetensors, json and float64 NumPy, no code of specjax.

Equations of an EAGLE-3 head (one layer, embedding first):

    g = fc [low, mid, high]                 each tap normed first where fc_norm says so
    u = [norm_input(e), norm_hidden(g)]
    z = g + Attn(u)                         norm_hidden(g) in g's place: norm_before_residual
    a = z + SwiGLU(norm_post(z))
    logits = W_lm norm(a)                   a is the next step's g; norm(a) is: norm_output
"""

import json
import math

import numpy as np
from numpy_llama import frequencies, rms_norm, rotate
from safetensors.numpy import load_file


def load(folder):
    """(config, float64 tensors by name) of a folder."""
    tensors = load_file(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    return raw, {name: np.asarray(w, np.float64) for name, w in tensors.items()}


def attention(raw, W, p, u_RxM, positions_R):
    """Causal attention of rows over each other."""
    H, G = raw["num_attention_heads"], raw["num_key_value_heads"]
    R = len(u_RxM)
    heads = {}
    for name, count in (("q", H), ("k", G), ("v", G)):
        h = u_RxM @ W[f"{p}self_attn.{name}_proj.weight"].T
        h = (h + W.get(f"{p}self_attn.{name}_proj.bias", 0.0)).reshape(R, count, -1)
        if f"{p}self_attn.{name}_norm.weight" in W:
            h = rms_norm(h, W[f"{p}self_attn.{name}_norm.weight"], raw["rms_norm_eps"])
        angle_RxJ = positions_R[:, None] * frequencies(raw)
        heads[name] = h if name == "v" else rotate(h, angle_RxJ)
    out = []
    for head in range(H):
        g = head * G // H
        scores = heads["q"][:, head] @ heads["k"][:, g].T / math.sqrt(heads["q"].shape[-1])
        weights = np.where(np.tri(R, dtype=bool), np.exp(scores - scores.max()), 0.0)
        out.append(weights / weights.sum(-1, keepdims=True) @ heads["v"][:, g])
    y = np.concatenate(out, -1) @ W[f"{p}self_attn.o_proj.weight"].T
    return y + W.get(f"{p}self_attn.o_proj.bias", 0.0)


def swiglu(W, p, x):
    gate, up = x @ W[f"{p}mlp.gate_proj.weight"].T, x @ W[f"{p}mlp.up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ W[f"{p}mlp.down_proj.weight"].T


def midlayer(raw, W, p, g, e, positions, norm_before_residual=False):
    eps = raw["rms_norm_eps"]
    e = rms_norm(e, W[f"{p}input_layernorm.weight"], eps)
    normed = rms_norm(g, W[f"{p}hidden_norm.weight"], eps)
    z = normed if norm_before_residual else g
    z = z + attention(raw, W, p, np.concatenate([e, normed], -1), positions)
    return z + swiglu(W, p, rms_norm(z, W[f"{p}post_attention_layernorm.weight"], eps))


def block(raw, W, p, x, positions):
    eps = raw["rms_norm_eps"]
    x = x + attention(raw, W, p, rms_norm(x, W[f"{p}input_layernorm.weight"], eps), positions)
    return x + swiglu(W, p, rms_norm(x, W[f"{p}post_attention_layernorm.weight"], eps))


def fused(raw, layer, W, taps):
    """g of rows, from the features of each tap."""
    if raw.get("fc_norm", raw.get("speculators_model_type") == "fasteagle"):
        taps = [
            rms_norm(t, W[f"fc_norm.{i}.weight"], layer["rms_norm_eps"]) for i, t in enumerate(taps)
        ]
    return np.concatenate(taps, -1) @ W["fc.weight"].T


def entered_layers(raw, layers):
    """Layers whose input is tapped: each key in its own convention, else the default."""
    if raw.get("eagle_config"):
        return [i + 1 for i in raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    return raw.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]


def to_target(W, logits, vocab_size):
    """Draft logits -> logits over the target's vocabulary, by d2t's offsets."""
    offsets = W.get("d2t", np.zeros(len(logits))).astype(int)
    out = np.full(vocab_size, -np.inf)
    out[np.arange(len(logits)) + offsets] = logits
    return out


def draft_chain(folder, embed, entering, tokens, steps):
    """Greedy chain of an EAGLE-3 head after rows (features of x_p, token x_{p+1}).

    Args:
      folder: the head's.
      embed: the target's embedding, VxD; the file's own is used if it has one.
      entering: the residual stream entering each of the target's layers, TxD each.
      tokens: T tokens, row p's being x_{p+1}.
      steps: tokens to draft.

    Returns:
      (steps x V logits, the tokens drafted).
    """
    raw, W = load(folder)
    layer = raw.get("transformer_layer_config", raw)
    p = "layers.0." if "transformer_layer_config" in raw else "midlayer."
    embed = W.get("embed_tokens.weight", np.asarray(embed, np.float64))
    g = fused(raw, layer, W, [entering[i] for i in entered_layers(raw, len(entering))])
    tokens, rows, drafted = list(tokens), [], []
    for _ in range(steps):
        x = embed[np.array(tokens)]
        a = midlayer(
            layer, W, p, g, x, np.arange(len(tokens)), raw.get("norm_before_residual", False)
        )
        normed = rms_norm(a[-1], W["norm.weight"], layer["rms_norm_eps"])
        rows.append(to_target(W, W["lm_head.weight"] @ normed, len(embed)))
        drafted.append(int(rows[-1].argmax()))
        g = np.concatenate([g, (normed if raw.get("norm_output") else a[-1])[None]])
        tokens.append(drafted[-1])
    return np.stack(rows), drafted


def cascade(folder, embed, head, entering, tokens):
    """Logits of a FastEagle folder at its last row, depth by depth: N x V."""
    raw, W = load(folder)
    layer, positions = raw["transformer_layer_config"], np.arange(len(tokens))
    eps, e = layer["rms_norm_eps"], np.asarray(embed, np.float64)[np.array(tokens)]
    g = fused(raw, layer, W, [entering[i] for i in raw["eagle_aux_hidden_state_layer_ids"]])
    ids = np.flatnonzero(W["t2d"]) if "t2d" in W else np.arange(len(head))
    if raw["entry"] == "fc2h":
        normed = rms_norm(g, W["g_norm.weight"], eps), rms_norm(e, W["e_norm.weight"], eps)
        x = np.concatenate(normed, -1) @ W["entry.weight"].T
    rows = []
    for i in range(layer["num_hidden_layers"]):
        p = f"layers.{i}."
        if i == 0 and raw["entry"] == "wide_qkv":
            x = midlayer(layer, W, p, g, e, positions)
        else:
            x = block(layer, W, p, x, positions)
        logits = np.asarray(head, np.float64)[ids] @ rms_norm(x[-1], W["norm.weight"], eps)
        rows.append(to_target(W, logits, len(embed)))
    return np.stack(rows)
