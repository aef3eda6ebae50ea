"""Where arrays lie on many devices."""
