"""Tuning: the loss, the optimizer, one step, and the loop around it.

`loss`, `optimizer`, `state` and `step` need jax, flax and optax only; `loop` knows about runs.
"""
