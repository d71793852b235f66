"""`python -m lorakit`, the same as `lorakit`."""

from lorakit.cli import main

main()
