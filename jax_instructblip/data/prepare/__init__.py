"""Prepares a dataset: reads its original files and writes its records to ArrayRecord shards.

`shards` does so with worker processes on this machine, `beam` on a cluster with Apache Beam.
`builder` is the TFDS dataset builder that both use. `identity` finds out whether a prepared dataset
still agrees with its original files; `description` describes it for people; `to_store` copies it to
an object store.
"""
