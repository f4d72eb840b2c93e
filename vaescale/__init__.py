"""vaescale: variational autoencoders at scale."""
