"""Weights from elsewhere to ours and back: one table a tower, one engine, a closed ledger.

hf.py             a Hugging Face folder -> variant, facts of the source, leaves one at a time
export.py         a checkpoint of ours -> a Hugging Face folder
engine.py         Rule, Zeros, Drop; the ledger over them
transforms.py     the permutations, each with its inverse
safetensors.py    files read and written by seek
vision.py qformer.py t5.py llama.py    the tables
"""
