"""A training run: from settings to an adapter in a directory."""
