"""Fine-tuning language models: data, training, checkpoints, generation."""
