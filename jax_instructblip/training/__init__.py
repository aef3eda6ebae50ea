"""Training: the loss, the optimizer, the training step, and the loop that runs it.

`loss`, `optimizer`, `state` and `step` need only jax, flax and optax; `loop` is the only module
that knows about workdirs, configs and checkpoints together.
"""
