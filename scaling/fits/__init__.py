"""Scaling laws of the results of trainings."""
