"""`python -m madkernels.cli`: the command without its script."""

from madkernels.cli.main import main

main()
