"""Weights from elsewhere to ours and back: one table a tower, one engine, a closed ledger.

families.py       a row each architecture: sections of config.json, tables of its towers
config_keys.py    keys of config.json, read and written by the same rows
hf_config.py      a config.json -> variant, checked
hf_folder.py      a Hugging Face folder -> variant, facts of the source, leaves one at a time
convert.py        that -> a checkpoint folder of ours
positions.py      the table of positions of the ViT, resized to other images
stored_model.py   a checkpoint or a run over its base, as writers take it
export.py         that -> a Hugging Face folder
engine.py         Rule, Zeros, Drop; the ledger over them
transforms.py     the permutations, each with its inverse
safetensors.py    files read and written by seek
tables/           one a tower: vision qformer t5 llama opt
"""
