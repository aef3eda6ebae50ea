"""From a benchmark to `results.json`: one protocol, one way to an answer, one row a prediction.

`protocol` (what is asked) -> `task` (records and prompts) -> `answering` (rows of `predictions`) ->
`scoring` (by `metrics`) -> `suite` (several tasks, `results.json`, `reports`). `benchmarks` and
`family_accuracies` go this way for the `settings` of one evaluation.
"""
