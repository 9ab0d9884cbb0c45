"""Text in: corpora, the tokenizer, chat templates and prompt sets."""

from specjax.data.corpora import (
    HELDOUT_MODULES,
    Document,
    local_documents,
    pack_tokens,
    stdlib_documents,
)
from specjax.data.prompts import (
    STDLIB_PROMPTS,
    Prompt,
    load_prompts,
    prompt_set_names,
    stdlib_training_prompts,
)
from specjax.data.templates import (
    conversation_messages,
    encode_chat,
    encode_prompt,
    turn_messages,
)
from specjax.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

__all__ = [
    "HELDOUT_MODULES",
    "STDLIB_PROMPTS",
    "Document",
    "Prompt",
    "conversation_messages",
    "encode_chat",
    "encode_prompt",
    "load_prompts",
    "load_tokenizer",
    "local_documents",
    "pack_tokens",
    "prompt_set_names",
    "save_tokenizer",
    "stdlib_documents",
    "stdlib_training_prompts",
    "train_bpe",
    "turn_messages",
]
