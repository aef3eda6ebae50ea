"""Metrics: `table` has each by name, `metric` what one takes and returns, a file each family."""
