"""`python -m keepshot` (and `torchrun -m keepshot`)."""

from keepshot.cli import main

main()
