"""lrt-deploy: Latent Recurrent Transformers, from checkpoint to running deployment."""
