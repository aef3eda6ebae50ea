"""Plans of a step (memory, FLOPs, traffic) for chips that need not be present."""
