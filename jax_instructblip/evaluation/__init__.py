"""Evaluation: from benchmark questions to predictions, scores, `results.json` and a report.

`protocol` (how each benchmark is asked and scored) -> `task` (a protocol with its records) ->
`answering` (the model's answers, rows of `predictions`) -> `scoring` (by `metrics`) -> `suite`
(runs several tasks, writes `results.json` and `reports`). `benchmarks` and `family_accuracies` are
the two entry points; both take one evaluation's `settings`.
"""
