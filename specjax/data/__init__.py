"""Text in: corpora, the tokenizer, chat templates and prompt sets."""
