"""The built-in target, pretrained from nothing on the Python standard library.

Source: this project. A 24-layer Llama of width 128 (5.0M parameters, 2048 byte-level BPE tokens),
deep and thin so that a light drafter is light beside it. Text: the running Python's standard
library without its tests, 39 modules held out (specjax/data/corpora.py).

Expected: see the model card, specjax/models/builtin/README.md.
Command:  python -m experiments.main --config=configs/builtin_target.py --workdir=runs/builtin
Smoke:    python -m experiments.main --config=configs/builtin_target.py:smoke
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """Presets: "" (the shipped model), "smoke" (seconds, for CI)."""
    config = ConfigDict()
    config.name = "builtin_target"
    config.experiment = "pretrain"
    config.preset = preset
    config.seed = 0
    config.mesh = (-1, 1, 1)

    config.model = ConfigDict()
    config.model.vocab_size = 2048
    config.model.hidden_size = 128
    config.model.intermediate_size = 384
    config.model.num_layers = 24
    config.model.num_heads = 2
    config.model.num_kv_heads = 1
    config.model.head_dim = 64
    config.model.tie_word_embeddings = True
    config.model.max_position_embeddings = 1024
    config.model.rope_theta = 10000.0
    config.model.rms_norm_eps = 1e-5

    config.max_documents = 0  # 0: all of them
    config.lengths = (256, 1024)  # tokens a window, stage by stage
    config.batch_sizes = (8, 2)
    config.stage_steps = (1600, 100)

    config.optimizer = common.optimizer(3e-3, 60)  # embeddings and norms: AdamW
    config.optimizer.name = "muon"  # the layers' kernels
    config.optimizer.final_lr_ratio = 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.tensorboard = False  # metrics.jsonl's numbers for TensorBoard too
    config.log_every = 20
    config.evaluate_every = 500
    config.checkpoint_every = 250

    if preset == "smoke":
        config.model.num_layers = 2
        config.model.vocab_size = 512
        config.max_documents = 12
        config.lengths, config.batch_sizes, config.stage_steps = (64, 128), (4, 2), (20, 10)
        config.evaluate_every = 0
    elif preset:
        raise ValueError(f"builtin_target: unknown preset {preset!r}; one of '', 'smoke'")
    return config
