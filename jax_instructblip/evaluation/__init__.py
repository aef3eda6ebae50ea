"""How good the answers are: one file a family of metrics, the answers, the reports."""
