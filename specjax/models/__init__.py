"""The target: configuration, layers, forward pass, Hugging Face folders, the built-in model."""
