"""Many runs: where they are done, and where their results are kept."""
