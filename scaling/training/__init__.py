"""Training one language model: text to tokens, the trainer, its checkpoints, and models of them."""
