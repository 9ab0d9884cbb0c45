"""Byte-level BPE: trained on any text, saved and loaded as a Hugging Face tokenizer folder."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from specjax.files import write_text

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")

# Where BPE may not merge across, in the manner of GPT-4's pattern. Line breaks with the indent
# that follows are one piece, apart from the punctuation before them: a text cut at the end of a
# line then splits as the whole text does, so a prompt cut there looks like training text.
SPLIT_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one sign before it
        r"\p{N}{1,3}",  # up to three digits
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # punctuation
        r"\s*[\r\n][^\S\r\n]*",  # line breaks and the next line's indent
        r"[^\S\r\n]+(?!\S)",  # spaces, but for the last, which belongs to the next word
        r"\s",
    )
)
_BYTES = 256


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, str] = SPECIAL_TOKENS
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, trained on `texts`.

    The special tokens (begin, end) are ids 0 and 1; encoding prepends the first. Every UTF-8 text
    survives encoding and decoding unchanged. Raises ValueError where `vocab_size` has no room
    for the 256 bytes and the special tokens.
    """
    if len(special_tokens) != 2:
        raise ValueError(f"special_tokens: a begin and an end token expected, not {special_tokens}")
    least = _BYTES + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size: {vocab_size} is less than {least} (bytes, special tokens)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = special_tokens[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 0)]
    )
    return tokenizer


def save_tokenizer(
    tokenizer: tokenizers.Tokenizer, folder: str | Path, model_max_length: int
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them.

    Ids 0 and 1 are the begin and end tokens, as `train_bpe` makes them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(0),
        "eos_token": tokenizer.id_to_token(1),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


def load_tokenizer(folder: str | Path) -> Any:
    """A transformers fast tokenizer from a folder, or from the hub for an id such as "org/name".

    tokenizer.json is taken as it stands, whatever class tokenizer_config.json names: classes
    rebuild parts of it, and code from the folder is never run. A local folder needs no network.
    Raises FileNotFoundError for a folder without tokenizer.json and ValueError for a file that
    cannot be read as a tokenizer, naming the file in both cases.
    """
    # Its advice to install torch is not for us.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        return _hub_tokenizer(str(folder))
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; a tokenizer folder needs it")
    for part in (file, file.with_name("tokenizer_config.json")):
        _check_json(part)
    try:
        return PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust parser raises bare Exception
        raise ValueError(f"{file}: not a tokenizer ({error})") from error


def _hub_tokenizer(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: neither a local folder nor a hub id with a tokenizer.json ({error})"
        ) from error


def _check_json(file: Path) -> None:
    if not file.is_file():
        return
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
