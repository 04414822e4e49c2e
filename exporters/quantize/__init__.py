"""Integer weights and activations: what is measured, how it is stored, and what was stored."""
