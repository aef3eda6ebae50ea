"""From the original files of a dataset to ArrayRecord shards.

`shards` does it with worker processes here, `beam` on a cluster; `identity` is what a prepared
dataset is compared by, `description` says what it holds, `builder` is the TFDS builder behind both.
"""
