"""The verbs of `jax-instructblip`: flags in, one call of the library out.

A verb is a module here with a docstring, whose first line is its line in `jax-instructblip --help`,
and `def main(argv: list[str]) -> int`, which gets the words after the verb and returns the exit
code. It raises ValueError or OSError for what the user can mend. Nothing else registers it.

`main` imports what it calls when the flags have been read: JAX, tokenizers and data libraries take
seconds, which neither `--help` nor a misspelt flag should wait for.
"""
