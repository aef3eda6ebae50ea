"""Readers of the original annotation files, one module for each family of tasks."""
