"""Training and assembly of the embedded checkpoints: tokenizers, vision tower, language models."""
