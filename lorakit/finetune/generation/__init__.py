"""What a base writes with its adapters: any mixture of both in one batch, conversations, and how right it is."""
