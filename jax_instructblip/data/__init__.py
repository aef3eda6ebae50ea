"""Training data: annotation files are read, turned into batches and put on the devices."""
