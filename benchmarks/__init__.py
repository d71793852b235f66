"""Measurements of lorakit; nothing here is part of the package."""
