"""Names of forms and files of features; without JAX, for flags."""

FORMS = ("raw", "projected", "normalised")  # of a first stage's features
FORMATS = ("npz", "arrayrecord")  # of shards
SHARD = 1_024  # images per shard, by default
