"""Training: the loss, the optimizer, the training step, and the loop that runs it.

`loss`, `optimizer`, `state` and `step` know nothing of files; `loop` brings config, data,
checkpoints and workdir together.
"""
