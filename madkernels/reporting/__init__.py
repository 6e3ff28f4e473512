"""What makes the HTML reports and the pictures of results, for MAD, scaling laws and benchmarks alike."""
