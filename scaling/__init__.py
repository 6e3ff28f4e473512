"""Scaling laws of architectures. Nothing here yet."""
