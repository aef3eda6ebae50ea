"""What a train step needs on chips that need not be there: memory, FLOPs, what moves."""
