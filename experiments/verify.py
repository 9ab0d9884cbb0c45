"""Checks that decoding with a drafter emits what the target alone would have emitted.

python -m experiments.verify --target=FOLDER [--drafter=FOLDER] [--rule=NAME]

Exit status: 0 if every check holds (a lossy rule is measured and labelled, not checked), 1 if one
fails, 2 if the flags or the files they name are wrong.
"""

import json
import sys

from absl import app, flags

from experiments import commands
from experiments.checks import verify
from experiments.commands import tried, usage_error
from specjax import load_drafter, load_target
from specjax.data.prompts import load_prompts
from specjax.evaluation.benchmark import Protocol, prompt_ids
from specjax.evaluation.exactness import Settings, resolve_rules
from specjax.files import write_text
from specjax.verification import get_rule

_TARGET = flags.DEFINE_string("target", "builtin", "'builtin', a model folder or a hub id")
_DRAFTER = flags.DEFINE_string(
    "drafter", None, "drafter folder; none: plain decoding against recomputation without a cache"
)
_RULE = flags.DEFINE_string("rule", None, "verification rule; none: the drafter's default")
_TEMPERATURES = flags.DEFINE_list("temperatures", "0,0.6,1.0", "temperatures to check")
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most probable tokens, 0 = all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the most probable tokens up to this mass, 1 = all")
_PROMPTS = flags.DEFINE_string("prompts", "stdlib", "prompt set, by name or path")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the named prompt sets")
_COUNT = flags.DEFINE_integer("count", 24, "prompts, at most", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "new tokens an answer", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 0, "prompts decoded at once, 0 = all", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of sampling, and apart from it of the noise in the tests")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "of the target")
_ALPHA = flags.DEFINE_float(
    "alpha", 0.01, "chance, over all temperatures together, of refusing an exact pair"
)
_JSON = flags.DEFINE_string("json", None, "file to write the outcome to")


def read_flags():
    """(target, drafter, prompts, settings) that the flags name. Raises app.UsageError."""
    temperatures = tried("temperatures", lambda: tuple(map(float, _TEMPERATURES.value)))
    try:
        settings = Settings(
            temperatures, _TOP_K.value, _TOP_P.value, _MAX_NEW_TOKENS.value, _BATCH.value,
            _SEED.value, _ALPHA.value,
        )  # fmt: skip
    except ValueError as error:
        raise app.UsageError(f"--{error}") from error  # starts with the field
    if _RULE.value is not None:
        tried("rule", get_rule, _RULE.value)
    target = tried("target", load_target, _TARGET.value, _DTYPE.value)
    drafter = tried("drafter", load_drafter, _DRAFTER.value, target) if _DRAFTER.value else None
    tried("rule", resolve_rules, target, drafter, _RULE.value, settings)
    texts = tried("prompts", load_prompts, _PROMPTS.value, _COUNT.value, _DATA_DIR.value)
    room = target.config.max_position_embeddings - settings.max_new_tokens
    if room < 2:
        raise usage_error("max_new_tokens", f"{settings.max_new_tokens} leave no room for a prompt")
    protocol = Protocol(
        "verify", settings.sampling(0.0), settings.max_new_tokens, max_prompt_tokens=room
    )
    prompts = [prompt_ids(target, p, [], protocol) for p in texts]
    return target, drafter, prompts, settings


def main():
    target, drafter, prompts, settings = read_flags()
    status, report = verify(target, drafter, prompts, _RULE.value, settings)
    if _JSON.value:
        files = {"target": _TARGET.value, "drafter": _DRAFTER.value, "dtype": _DTYPE.value}
        text = json.dumps(files | report, indent=2, allow_nan=False) + "\n"
        tried("json", write_text, _JSON.value, text)
    sys.exit(status)


if __name__ == "__main__":
    commands.run(main)
