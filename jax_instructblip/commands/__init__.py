"""The verbs (subcommands) of `jax-instructblip`: each parses flags and makes one library call.

A verb is a module here, its name with `_` for `-`, with `def main(argv: list[str]) -> int`,
which gets the words after the verb and returns the exit code. The first line of the module's
docstring is its line in `jax-instructblip --help`. No other registration is needed. `main` raises
ValueError or OSError for errors that the user can fix.

`main` parses the flags before it imports JAX, tokenizers or data libraries: these imports take
seconds, which `--help` and misspelt flags should not cost.
"""
