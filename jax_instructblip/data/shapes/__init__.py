"""The embedded default world: `world` draws it, `tasks` asks about it, `dataset` splits it."""
