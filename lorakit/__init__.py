"""LoRA for any PyTorch model: attach, train, save, switch and merge low-rank updates."""

__version__ = "0.1.0"
