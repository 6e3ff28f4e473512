"""What is seen of folders of runs while they go on: on the terminal, and as a page that refreshes itself."""
