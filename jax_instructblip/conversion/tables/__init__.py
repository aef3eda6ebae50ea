"""Leaf names and transforms of each tower: Hugging Face's on one side, ours on the other."""
