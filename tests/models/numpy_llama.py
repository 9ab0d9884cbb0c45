"""An independent decoder in float64 NumPy: the oracle that tests hold the JAX forward against.

It reads a Hugging Face config dictionary and checkpoint tensors by name, and shares no code (and
no fused layout) with the package.
"""

import math

import numpy as np


def frequencies(raw):
    """Angular frequency of each rotated pair after RoPE scaling."""
    K = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    out = []
    for pair in range(K // 2):
        f = raw.get("rope_theta", 10000.0) ** (-2 * pair / K)
        if kind == "linear":
            f /= scaling["factor"]
        elif kind == "llama3":
            context, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / f
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength > context / low:
                f /= scaling["factor"]
            elif wavelength > context / high:
                smooth = (context / wavelength - low) / (high - low)
                f = (1 - smooth) * f / scaling["factor"] + smooth * f
        out.append(f)
    return np.array(out)


def rms_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x_TxHxK, angle_TxJ):
    """Complex rotation of the pairs (j, j + K/2)."""
    J = x_TxHxK.shape[-1] // 2
    z = (x_TxHxK[..., :J] + 1j * x_TxHxK[..., J:]) * np.exp(1j * angle_TxJ)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def forward(raw, tensors, tokens_T, positions_T=None, visible_TxT=None):
    """(logits_TxV, the residual stream entering each layer) of one sequence."""
    W = {name: np.asarray(w, np.float64) for name, w in tensors.items()}
    T, H, eps = len(tokens_T), raw["num_attention_heads"], raw["rms_norm_eps"]
    G = raw.get("num_key_value_heads") or H
    positions_T = np.arange(T) if positions_T is None else np.asarray(positions_T)
    visible_TxT = np.tri(T, dtype=bool) if visible_TxT is None else np.asarray(visible_TxT)
    angle_TxJ = positions_T[:, None] * frequencies(raw)
    x = W["model.embed_tokens.weight"][np.asarray(tokens_T)]
    entering = []
    for i in range(raw["num_hidden_layers"]):
        entering.append(x)
        p = f"model.layers.{i}."
        y = rms_norm(x, W[p + "input_layernorm.weight"], eps)
        heads = {}
        for name, count in (("q", H), ("k", G), ("v", G)):
            h = y @ W[f"{p}self_attn.{name}_proj.weight"].T
            h = h + W.get(f"{p}self_attn.{name}_proj.bias", 0.0)
            h = h.reshape(T, count, -1)
            if f"{p}self_attn.{name}_norm.weight" in W:
                h = rms_norm(h, W[f"{p}self_attn.{name}_norm.weight"], eps)
            heads[name] = h if name == "v" else rotate(h, angle_TxJ)
        out = []
        for head in range(H):
            g = head * G // H
            scores = heads["q"][:, head] @ heads["k"][:, g].T / math.sqrt(heads["q"].shape[-1])
            scores = np.where(visible_TxT, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ heads["v"][:, g])
        x = x + np.concatenate(out, -1) @ W[p + "self_attn.o_proj.weight"].T
        x = x + W.get(p + "self_attn.o_proj.bias", 0.0)
        y = rms_norm(x, W[p + "post_attention_layernorm.weight"], eps)
        gate, up = y @ W[p + "mlp.gate_proj.weight"].T, y @ W[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ W[p + "mlp.down_proj.weight"].T
    head_VxD = W.get("lm_head.weight", W["model.embed_tokens.weight"])
    return rms_norm(x, W["model.norm.weight"], eps) @ head_VxD.T, entering
