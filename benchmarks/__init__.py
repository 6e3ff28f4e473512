"""Speed, error and memory of the ops beside their peers: `madkernels bench`."""
