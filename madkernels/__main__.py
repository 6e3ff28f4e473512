"""`python -m madkernels`: the command without its script."""

from madkernels.cli.main import main

main()
