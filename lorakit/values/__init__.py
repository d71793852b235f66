"""Adapters as values: what a file holds of them without a model, arithmetic on them, and what can be measured."""
