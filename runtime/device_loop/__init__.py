"""Decoding that stays on the GPU: tokens are chosen there, and feed the next step without the host."""
