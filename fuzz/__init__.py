"""Damaged and hostile adapter files, tried on every reader: `make fuzz` for long, a test for a moment."""
