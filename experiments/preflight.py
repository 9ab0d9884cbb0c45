"""What a run would meet only after its training, refused before it."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.training_data import protocol, train_config
from specjax.evaluation.benchmark import Method, prompt_ids
from specjax.generation import make_engine
from specjax.models.target import Target
from specjax.sampling import Sampling
from specjax.training.objective import make_objective
from specjax.training.optimizers import make_optimizer
from specjax.verification import get_rule

LEAST = {
    "eval.prompts": 0, "eval.max_prompt_tokens": 0, "eval.max_new_tokens": 2, "eval.repeats": 1,
    "eval.timing_repeats": 1, "eval.batch": 1, "eval.bootstrap": 1, "calibrate.prompts": 0,
}  # fmt: skip
"""The least that fields may be; prefill emits the first new token, so a round takes a second."""

LEAST_OF_CALIBRATION = {"calibrate.max_new_tokens": 2}
LEAST_OF_PROBES = {"train.tau_prompts": 1, "train.tau_new_tokens": 2}


def check_config(config: ConfigDict) -> None:
    """What can be said without a target.

    Raises:
      ValueError: a field of `eval`, `calibrate`, the tau probes, a loss or an optimiser is out of
        range (names it).
    """
    for name in config.drafters:
        check_training(config, name)
    least = LEAST | (LEAST_OF_CALIBRATION if config.calibrate.prompts else {})
    if any(d.train.get("tau_every", config.train.tau_every) for d in config.drafters.values()):
        least |= LEAST_OF_PROBES
    for field, smallest in least.items():
        section, name = field.split(".")
        if config[section][name] < smallest:
            raise ValueError(f"{field}: {config[section][name]} must be at least {smallest}")
    cfg = config.eval
    for field in ("tasks", "temperatures"):
        if not cfg[field] or len(set(cfg[field])) < len(cfg[field]):
            raise ValueError(f"eval.{field}: {cfg[field]} must be some, each once")
    for temperature in cfg.temperatures:
        try:
            Sampling(temperature)
        except ValueError as error:
            raise ValueError(f"eval.temperatures: {error}") from error
    try:
        Sampling(1.0, cfg.top_k, cfg.top_p)
        if cfg.rule:
            get_rule(cfg.rule)
    except ValueError as error:  # starts with the field's name
        raise ValueError(f"eval.{error}") from error
    if cfg.rule == "judge":
        raise ValueError(
            "eval.rule: 'judge' forces nothing without a trained head, which no field names; call "
            "specjax.generate with rule=get_rule('judge', head=JudgeHead.load(FILE))"
        )


def check_training(config: ConfigDict, name: str) -> None:
    """Refuses what a drafter cannot be trained with.

    Raises:
      ValueError: starts with the part of the config, the drafter's own if it has changed it.
    """
    cfg, own = train_config(config, name), config.drafters[name].train
    within = lambda part: f"drafters.{name}.train" if part in own else "train"  # noqa: E731
    if cfg.loss.gate == "recorded":
        raise ValueError(
            f"{within('loss')}.loss.gate: 'recorded' weighs by what OnlineTrainer records while it "
            "decodes; a recipe's rows have no record ('rejected' needs none)"
        )
    try:
        objective = make_objective(cfg.loss, cfg.steps, cfg.remat)
    except ValueError as error:
        raise ValueError(f"{within('loss')}.loss: {error}") from error
    try:
        make_optimizer(cfg.optimizer, cfg.steps, objective.deepkd)
    except ValueError as error:
        raise ValueError(f"{within('optimizer')}.{error}") from error


def check_prompts(config: ConfigDict, target: Target, tasks: dict) -> None:
    """Refuses prompts that do not fit the target's context, even with empty answers between turns.

    Args:
      tasks: name -> prompts.

    Raises:
      ValueError: names task, question and field.
    """
    most = target.config.max_position_embeddings - 1  # and a new token
    for task, prompts in tasks.items():
        for prompt in prompts:
            unanswered = [""] * (len(prompt.turns) - 1)
            count = len(prompt_ids(target, prompt, unanswered, protocol(config, task, 0.0)))
            if count > most:
                raise ValueError(
                    f"eval.max_prompt_tokens: question {prompt.question_id!r} of task {task!r} has "
                    f"{count} tokens, more than {most}, the context of {target.name} less one; set "
                    "it to that at most"
                )


def check_methods(config: ConfigDict, target: Target, methods: Sequence[Method]) -> None:
    """Refuses a rule that does not verify what a drafter drafts. Nothing is compiled.

    Raises:
      ValueError: names rule, drafter and temperature.
    """
    for method in methods:
        for temperature in config.eval.temperatures:
            sampling = protocol(config, "", temperature).sampling
            try:
                make_engine(target, method.drafter, sampling, rule=config.eval.rule or None)
            except ValueError as error:
                raise ValueError(
                    f"eval.rule: drafters.{method.name} at temperature {temperature:g}: {error}"
                ) from error
