"""Pretraining of a small target from scratch: how the built-in model was made."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from specjax import sharding
from specjax.data import corpora
from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.data.windows import Windows
from specjax.models import transformer
from specjax.models.config import ModelConfig
from specjax.models.hf import save_target
from specjax.progress import say
from specjax.training.checkpoints import Checkpoints
from specjax.training.loop import fit
from specjax.training.metrics import MetricsLog
from specjax.training.optimizers import make_optimizer
from specjax.training.state import create, make_step


def token_losses(params, config: ModelConfig, tokens_BxT):
    """Next-token cross-entropy in nats, Bx(T-1)."""
    hidden = transformer.forward(params, config, tokens_BxT[:, :-1]).hidden_BxTxD
    logits = transformer.logits_of(params, hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:])


def bits_per_byte(params, config: ModelConfig, tokens: np.ndarray, num_bytes: int, length: int):
    """Held-out bits per UTF-8 byte over a whole stream, read in windows without carried context."""
    total = jax.jit(lambda p, t: token_losses(p, config, t).sum())
    count = (len(tokens) - 1) // length
    windows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
    nats = sum(float(total(params, windows[i : i + 8])) for i in range(0, count - 7, 8))
    scored = (count // 8) * 8 * length
    return nats / np.log(2) / (num_bytes * scored / len(tokens))


def model_config(cfg: ConfigDict, bos: int, eos: int) -> ModelConfig:
    """The geometry that `config.model` describes."""
    return ModelConfig(**cfg.to_dict(), bos_token_id=bos, eos_token_ids=(eos,))


def pretrain(config: ConfigDict, folder):
    """Trains tokenizer and model, writes the Hugging Face folder `folder/model`.

    The sequence length grows in stages (`config.lengths`), all under one schedule.
    """
    train, heldout = (corpora.stdlib_documents(s) for s in ("train", "heldout"))
    if config.max_documents:
        train, heldout = train[: config.max_documents], heldout[:4]
    tokenizer = train_bpe([d.text for d in train], config.model.vocab_size)
    bos, eos = 0, 1
    model = model_config(config.model, bos, eos)
    stream = corpora.pack_tokens(train, tokenizer, bos, eos)
    held_stream = corpora.pack_tokens(heldout, tokenizer, bos, eos)
    held_bytes = sum(len(d.text.encode()) for d in heldout)
    say(f"pretrain: {len(stream)} training tokens, {len(held_stream)} held out")

    mesh = sharding.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, sum(config.stage_steps))
    params = transformer.init_params(jax.random.key(config.seed), model)
    for layer in params["layers"]:  # keep the residual stream's variance flat over depth
        for module, name in (("attn", "o"), ("mlp", "down")):
            layer[module][name] = layer[module][name] * (2 * model.num_layers) ** -0.5
    state = create(transformer.stack_layers(params), optimizer)
    state = sharding.place(state, sharding.shardings(mesh, state))

    def loss_fn(params, frozen, tokens, step):
        return token_losses(params, model, tokens).mean(), {}

    step_fn = make_step(loss_fn, optimizer)
    checkpoints = Checkpoints(folder / "checkpoints" / "pretrain")
    metrics = MetricsLog(folder / "metrics.jsonl", config.tensorboard)
    started, before = time.time(), 0
    sample = min(len(held_stream), 60_000)

    def evaluate(state):
        part = held_bytes * sample / len(held_stream)
        return {
            "bits_per_byte": bits_per_byte(state.params, model, held_stream[:sample], part, 512)
        }

    for i, (length, size, steps) in enumerate(
        zip(config.lengths, config.batch_sizes, config.stage_steps, strict=True)
    ):
        windows = Windows(stream, length + 1, config.seed + i)

        def batch_fn(step, state, windows=windows, size=size, before=before):
            batch = windows.batch(step - before, size)
            return jax.device_put(jnp.asarray(batch), sharding.batch_sharding(mesh))

        before += steps
        state = fit(
            "pretrain", state, (), step_fn, batch_fn, before,
            checkpoints=checkpoints, checkpoint_every=config.checkpoint_every, metrics=metrics,
            log_every=config.log_every, evaluate=evaluate, evaluate_every=config.evaluate_every,
            tokens_per_step=size * length,
        )  # fmt: skip
    params = transformer.unstack_layers(state.params)
    result = {
        "parameters": sum(w.size for w in jax.tree.leaves(params)),
        "training_tokens": sum(
            t * b * s
            for t, b, s in zip(config.lengths, config.batch_sizes, config.stage_steps, strict=True)
        ),
        "corpus_tokens": len(stream),
        "heldout_bits_per_byte": bits_per_byte(
            state.params, model, held_stream, held_bytes, max(config.lengths)
        ),
        "seconds_this_session": time.time() - started,
    }
    save_target(folder / "model", model, jax.device_get(params))
    save_tokenizer(tokenizer, folder / "model", model.max_position_embeddings)
    metrics.write("pretrain/final", before, **result)
    say(f"pretrain: {result}")
    return result
