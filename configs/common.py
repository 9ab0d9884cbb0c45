"""What every drafter recipe has in common; recipes change fields, never add code."""

from ml_collections import ConfigDict

# The paper's evaluation protocol: five tasks, temperature 0 and 1, batch 1.
PAPER_TASKS = ("mt_bench", "humaneval", "gsm8k", "cnn_dm", "alpaca")


def optimizer(learning_rate: float = 5e-5, warmup_steps: int = 100) -> ConfigDict:
    """EAGLE-3's optimiser (AdamW 0.9/0.95, clip 0.5) under warm-up and cosine decay."""
    cfg = ConfigDict()
    cfg.name = "adamw"
    cfg.learning_rate = learning_rate
    cfg.muon_learning_rate = 2e-2  # read by name = "muon" only
    cfg.warmup_steps = warmup_steps
    cfg.final_lr_ratio = 0.05
    cfg.b1 = 0.9
    cfg.b2 = 0.95
    cfg.eps = 1e-8  # AdamW's
    cfg.weight_decay = 0.0
    cfg.clip_norm = 0.5
    return cfg


def loss() -> ConfigDict:
    """The plain objective: cross-entropy against the target's distribution at every depth."""
    cfg = ConfigDict()
    cfg.ce = 1.0  # weight of the divergence from the target's distribution
    cfg.divergence = "cross_entropy"  # that, or one of `distillation.divergences`
    cfg.divergence_options = ConfigDict()
    cfg.temperature = 1.0  # of both sides of the divergence
    cfg.hard = 0.0  # weight of the cross-entropy of the text's own next token
    cfg.feature = 0.0  # weight of Smooth-L1 against the target's LM-head input
    cfg.decay = 0.8  # weight of depth i is decay^(i-1)
    cfg.chunk = 0  # rows of full-vocabulary logits held at once, 0 = all
    cfg.gate = "everything"  # which positions count: one of `distillation.gates`
    cfg.gate_options = ConfigDict()
    cfg.reference_steps = 0  # of the reference drafter that gate "adaspec" compares with
    cfg.deepkd = False  # three streams with a momentum each, in place of ce and hard
    cfg.deepkd_options = ConfigDict()
    return cfg


def drafter(
    name: str,
    init: dict,
    tree: dict,
    budgets: tuple = (),
    train: dict | None = None,
    corpus: bool = False,
) -> ConfigDict:
    """One contender.

    Args:
      name: drafter family.
      init: its fields (geometry, trained depth).
      tree: the fields that shape its tree at the shared node budget; `best_nodes` in their place
        asks for the rank paths that pay best with so many rows on training text.
      budgets: trees that calibration may choose from instead.
      train: what it changes of `config.train`.
      corpus: whether it retrieves from the training rows.
    """
    cfg = ConfigDict()
    cfg.drafter = name
    cfg.init = ConfigDict(init)
    cfg.tree = ConfigDict(tree)
    cfg.budgets = tuple(dict(b) for b in budgets)
    cfg.train = ConfigDict(train or {})
    cfg.corpus = corpus
    return cfg


def base(name: str, preset: str) -> ConfigDict:
    """A complete config for the built-in target; recipes start from it."""
    config = ConfigDict()
    config.name = name
    config.experiment = "compare"
    config.preset = preset
    config.seed = 0
    # ("data", "fsdp", "tensor"); -1 takes what is left, (1, 1, 1) is one device of however many.
    config.mesh = (1, 1, 1)
    # Ordered (regex over the end of a path, axes by dimension), before specjax/sharding.py's own.
    config.sharding_rules = ()
    config.drafter_sharding = "rules"  # or "replicated": whole on every device beside the target

    config.tensorboard = False  # metrics.jsonl's numbers for TensorBoard too; extra `tensorboard`

    config.target = ConfigDict()
    config.target.name = "builtin"  # "builtin", a Hugging Face folder or a hub id
    config.target.dtype = "float32"
    config.target.scan_layers = False

    config.data = ConfigDict()
    config.data.prompts = "stdlib-train"  # prompt set whose continuations are the training data
    config.data.data_dir = ""  # folder of local prompt sets
    config.data.count = 320  # sequences
    config.data.max_prompt_tokens = 96  # the last ones are kept, 0 = all
    config.data.max_new_tokens = 128
    config.data.temperature = 0.0
    config.data.batch = 64
    config.data.length = 224  # tokens of a training row
    config.data.supervise_prompt = True  # not read for conversations: there, answers are
    # Conversations in place of prompts, the first `count`: a file or folder of .jsonl, .json or
    # .array_record, or "tfds:NAME/SPLIT?field=..."; written in eval.chat_template.name
    config.data.conversations = ""
    config.data.regenerate = True  # answers written anew by the target, or trained on as they are
    config.data.skip_damaged = False  # leave out rows that are no conversation, else refuse them
    config.data.packing = False  # as many texts in a row as fit, kept apart by masks

    config.train = ConfigDict()
    config.train.steps = 225
    config.train.batch_size = 4
    config.train.optimizer = optimizer()
    config.train.loss = loss()
    config.train.remat = False  # recompute the drafter's layers in the backward pass: less memory
    config.train.source = "target"  # who writes the training text: one of `training.sources`
    # Folder for the target's features of the training rows, written once and read instead of the
    # target's forward; "" = none. Runs may share it
    config.train.cache_features = ""
    config.train.own_share = 0.5  # of the rows that the drafter writes, source "mix"
    config.train.refresh = 30  # steps between two writings of the drafter
    config.train.own_temperature = 1.0  # at which it writes
    config.train.acceptance_steps = 100  # of the acceptance head that draft_model may stop by
    config.train.log_every = 20
    config.train.checkpoint_every = 75
    config.train.tau_every = 75
    config.train.tau_prompts = 8
    config.train.tau_new_tokens = 32

    config.eval = ConfigDict()
    config.eval.tasks = ("stdlib",)
    config.eval.temperatures = (0.0, 1.0)
    config.eval.rule = ""  # verification rule, "" = the drafter's own; greedy at temperature 0
    config.eval.top_k = 0
    config.eval.top_p = 1.0
    config.eval.prompts = 32  # of each task, 0 = all
    config.eval.max_new_tokens = 96
    config.eval.max_prompt_tokens = 192  # the last ones are kept, 0 = all
    config.eval.repeats = 1
    config.eval.timing_repeats = 15  # timed calls of each part of a round, on each of three states
    config.eval.batch = 1
    config.eval.chat_template = ConfigDict({"use": False, "name": ""})  # "" = the tokenizer's own
    config.eval.bootstrap = 1000

    config.calibrate = ConfigDict()
    config.calibrate.prompts = 8
    config.calibrate.max_new_tokens = 32

    config.drafters = ConfigDict()
    return config
