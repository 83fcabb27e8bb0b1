"""python -m workloads."""

from .cli import main

main()
