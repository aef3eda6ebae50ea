"""Names of the forms and file formats of features, for flags: imports no JAX."""

FORMS = ("raw", "projected", "normalised")  # of a first stage's features
FORMATS = ("npz", "arrayrecord")  # of shards
SHARD = 1_024  # images per shard, by default
