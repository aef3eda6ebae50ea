"""Inference: from a checkpoint and images to answers, rankings and retrieval.

`loading` resolves a model and reads its weights, `pipeline` is what `load()` returns, `batching`
pads images and prompts. Answers come from `decode` (greedy and sampled; `sampling` changes scores),
`beam_search` or `ranking`; `generation_config` holds their settings. `retrieval` is for BLIP-2's
first stage. `asking` answers questions about image files for the commands, `text_loading` loads
only the tokenizers of a checkpoint.
"""
