"""Readers of the original annotation files, one module for each kind of dataset."""
