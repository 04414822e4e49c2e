"""Serve a decoder: one engine thread on continuous batches, the logic of OpenAI's API, and HTTP around it."""
