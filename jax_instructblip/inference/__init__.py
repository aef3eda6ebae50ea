"""From a checkpoint and images to answers.

`loading` finds a model and its weights, `pipeline` is what `load()` returns, `batching` pads images
and prompts; `decode` (greedy and sampled, `sampling` its scores), `beam_search` and `ranking` are
the ways to an answer; `generation_config` names their settings. `asking` puts questions about files
to a checkpoint, `text_loading` reads its tokenizers alone.
"""
