"""Readers of the original annotation files, one module for each kind of dataset.

A reader is a function of `raw`, the folder of a dataset's original files, and `split`, a key of
`files` or `rerelease` in the dataset's row of the module's table `DATASETS` (`dataset.Dataset`).
"""
