"""The reference model in PyTorch, and the checkpoints that it is read from."""
