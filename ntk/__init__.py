"""Empirical neural tangent kernels of Hugging Face models."""
