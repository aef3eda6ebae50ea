"""HTML pages: `report` of an evaluation, `curves` of a training run, `samples` of training data."""
