"""Metrics: `table` lists all by name, `metric` has their interface, other files compute them."""
