"""Trainings of language models (`training`), laws of their results (`fits`), and the sweeps that join the two."""
