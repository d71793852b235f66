"""PEFT's directory: its config and its keys, both ways."""
