"""The placement of arrays on many devices, and the processes that share a run."""
