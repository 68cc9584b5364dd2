"""Learned priors on the latents of any network."""
