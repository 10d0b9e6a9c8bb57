"""The networks of the cascade: UNet, VAE, text encoder. Flax Linen; parameter paths mirror the PyTorch names."""
