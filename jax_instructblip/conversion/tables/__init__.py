"""Conversion tables of the towers: Hugging Face's tensor names, our parameters, transforms."""
