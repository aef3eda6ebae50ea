"""Placement of arrays on devices, and coordination of the processes of a run."""
