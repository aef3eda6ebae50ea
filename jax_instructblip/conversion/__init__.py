"""Weights from elsewhere to ours and back: one table a tower, one engine, a closed ledger.

families.py         a row each architecture: sections of config.json, tables of its towers
config_keys.py      keys of config.json, read and written by the same rows
hf_config.py        a config.json -> variant, checked
hf_folder.py        a Hugging Face folder -> variant, facts of the source, leaves one at a time
language_folder.py  a Hugging Face folder of a language model alone -> its leaves
lavis.py            the original's names for the tensors of the tables
original.py         original files (.pth) -> variant, facts of the source, leaves one at a time
convert.py          weights of either origin -> a checkpoint folder of ours
stored_model.py     a checkpoint or a run over its base, as writers take it
export.py           a stored model -> a Hugging Face folder
engine.py           Rule, Zeros, Drop; the ledger over them
transforms.py       the permutations, each with its inverse
safetensors.py      files read and written by seek
torch_files.py      tensors of .pth and .bin files, and nothing else of them
tables/             one a tower: vision qformer t5 llama opt
"""
