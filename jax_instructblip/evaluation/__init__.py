"""How good the answers are: one file a family of metrics, the harness, the report."""
