"""MAD: small capability tests whose scores predict how an architecture scales (Poli et al. 2024, arXiv 2403.17844)."""
