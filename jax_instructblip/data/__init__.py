"""From annotation files to batches on devices."""
