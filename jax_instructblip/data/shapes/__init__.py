"""The built-in toy dataset: `world` draws scenes, `tasks` has questions, `dataset` the splits."""
