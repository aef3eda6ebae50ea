"""Answering: `decode` runs the model token by token, `pipeline` is what `load()` returns."""
