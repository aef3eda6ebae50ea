"""The embedded checkpoints: how their tokenizers and frozen towers are trained and put together."""
