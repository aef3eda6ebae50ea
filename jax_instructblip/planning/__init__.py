"""Plans of a train step for chips that need not be there: memory, FLOPs, what moves."""
