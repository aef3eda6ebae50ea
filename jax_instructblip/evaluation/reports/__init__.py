"""Pages for people: `report` of an evaluation, `curves` of a run, `samples` of training data."""
