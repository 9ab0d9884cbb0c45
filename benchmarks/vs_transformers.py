"""python -m benchmarks.vs_transformers: the same folder decoded by transformers and by specjax.

Greedy decoding of the same prompts in the same process, prompt by prompt in turns: transformers
(torch, key/value cache) plainly, with prompt lookup, with an assistant where one is given; specjax
plainly. Both must give the same tokens, but where the top two logits tie; ms per new token
includes the prompt's forward on both sides, compilation and warm-up on neither.

    python -m benchmarks.vs_transformers --target=builtin
    python -m benchmarks.vs_transformers --target=random:288x768x6x32000 --new_tokens=128
"""

import contextlib
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console

from benchmarks import timing
from benchmarks.targets import TARGET_HELP, get_target
from experiments import commands
from specjax import generate
from specjax.console import make_console, print_rows
from specjax.models.hf import save_target
from specjax.models.target import BUILTIN, Target

_TARGET = flags.DEFINE_string("target", "builtin", TARGET_HELP)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "tokens per prompt", lower_bound=2)
_PROMPTS = flags.DEFINE_integer("prompts", 4, "random prompts", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "tokens a prompt", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed passes over the prompts", lower_bound=1)
_LOOKUP = flags.DEFINE_integer("lookup", 10, "prompt_lookup_num_tokens; 0 leaves it out")
_ASSISTANT = flags.DEFINE_string("assistant", None, "folder of an assistant for transformers")
_JSON = flags.DEFINE_string("json", None, "file for the numbers")

TIE = 1e-4
"""Logits closer than this count as a tie."""


def load_torch_model(folder):
    """The folder as a float32 torch model on all cores, in evaluation mode.

    Raises:
      SystemExit: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "benchmarks.vs_transformers compares with transformers on torch, which is not "
            "installed here; install a CPU build of torch and run it again"
        ) from error
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(timing.cores())
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@contextlib.contextmanager
def folder_of(spec: str, target: Target):
    """A Hugging Face folder with the target's weights: its own, or a temporary one in float32."""
    if not spec.startswith("random:"):
        yield BUILTIN if spec == "builtin" else pathlib.Path(spec)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_target(folder, target.config, target.params, "float32")
        yield folder


def torch_greedy(model, new_tokens: int, **options) -> Callable[[list[int]], list[int]]:
    """prompt -> exactly `new_tokens` greedy tokens by transformers' `generate`."""
    import torch

    def call(prompt):
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
                **options,
            )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    return call


def specjax_greedy(target: Target, new_tokens: int) -> Callable[[list[int]], list[int]]:
    """prompt -> exactly `new_tokens` greedy tokens by `specjax.generate`."""

    def call(prompt):
        return generate(target, [prompt], None, new_tokens, stop_tokens=()).tokens[0]

    return call


def is_tie(target: Target, prompt: list[int], first: list[int], second: list[int]) -> bool:
    """Whether two continuations part where the target's logits of both tokens are level."""
    at = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]))
    row_V = np.asarray(target.logits(jnp.asarray([prompt + first[:at]])))[0, -1]
    return abs(float(row_V[first[at]] - row_V[second[at]])) < TIE


def compare(target: Target, calls: dict[str, Callable], prompts, new_tokens, repeats) -> list[dict]:
    """Times the calls in turns and checks their tokens against those of the last, specjax.

    Returns one row a call: ms per token (median and quartiles over prompts and repeats), its
    ratio to specjax in the same turn, and how many prompts gave the same tokens or a tie.
    """
    seconds = {name: [] for name in calls}
    outputs = {name: [] for name in calls}
    for index in range(repeats + 1):  # the first pass compiles and warms up
        for prompt in prompts:
            for name, call in calls.items():
                started = time.perf_counter()
                tokens = call(prompt)
                if index:
                    seconds[name].append((time.perf_counter() - started) / new_tokens)
                else:
                    outputs[name].append(tokens)
    own = list(calls)[-1]
    rows = []
    for name in calls:
        clock = timing.Timing(tuple(seconds[name]))
        pairs = list(zip(prompts, outputs[name], outputs[own], strict=True))
        same = [a == b for _, a, b in pairs]
        ties = sum(is_tie(target, *pair) for pair, ok in zip(pairs, same, strict=True) if not ok)
        median, quartiles = timing.ratio(clock, timing.Timing(tuple(seconds[own])))
        rows.append(
            {
                "method": name, "ms_per_token": clock.ms, "quartiles_ms": clock.quartiles_ms,
                "times_specjax": median, "times_specjax_quartiles": quartiles,
                "prompts": len(prompts), "identical": sum(same), "ties": ties,
            }
        )  # fmt: skip
    return rows


def print_report(target: Target, rows: list[dict], new_tokens: int, console: Console) -> None:
    """One line a method."""
    console.print(
        f"{target.name}: {target.num_params / 1e6:.1f}M parameters, float32, {new_tokens} new "
        f"tokens a prompt, greedy; {timing.cores()} cores"
    )
    cells = [
        (
            r["method"], f"{r['ms_per_token']:.3f}", "{:.3f}-{:.3f}".format(*r["quartiles_ms"]),
            f"{r['times_specjax']:.2f}x", "{:.2f}-{:.2f}".format(*r["times_specjax_quartiles"]),
            f"{r['identical']}/{r['prompts']}" + (f" + {r['ties']} ties" if r["ties"] else ""),
        )
        for r in rows
    ]  # fmt: skip
    headings = "method | ms per token | quartiles | time / specjax | quartiles | same tokens"
    print_rows(console, headings, cells, "Greedy decoding side by side")


def main():
    target = commands.tried("target", get_target, _TARGET.value)
    new_tokens = _NEW_TOKENS.value
    longest = _PROMPT_TOKENS.value + new_tokens
    if longest > target.config.max_position_embeddings:
        raise app.UsageError(
            f"prompt_tokens + new_tokens = {longest} do not fit the target's context of "
            f"{target.config.max_position_embeddings}"
        )
    draw = np.random.default_rng(0)
    shape = _PROMPTS.value, _PROMPT_TOKENS.value
    prompts = draw.integers(3, target.config.vocab_size, shape).tolist()
    with folder_of(_TARGET.value, target) as folder:
        model = load_torch_model(folder)
    greedy = functools.partial(torch_greedy, model, new_tokens)
    calls = {"transformers greedy": greedy()}
    if _LOOKUP.value:
        lookup = greedy(prompt_lookup_num_tokens=_LOOKUP.value)
        calls["transformers prompt lookup"] = lookup
    if _ASSISTANT.value:
        assistant = load_torch_model(_ASSISTANT.value)
        calls["transformers assisted"] = greedy(assistant_model=assistant)
    calls["specjax vanilla"] = specjax_greedy(target, new_tokens)
    rows = compare(target, calls, prompts, new_tokens, _REPEATS.value)
    print_report(target, rows, new_tokens, make_console())
    if _JSON.value:
        report = {"target": target.name, "device": jax.devices()[0].device_kind, "rows": rows}
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
    wrong = [r["method"] for r in rows if r["identical"] + r["ties"] < r["prompts"]]
    if wrong:
        raise SystemExit(f"different tokens without a tie: {', '.join(wrong)}")


if __name__ == "__main__":
    commands.run(main)
