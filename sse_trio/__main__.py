"""`python -m sse_trio` is `sse-trio`."""

from sse_trio.cli import main

main()
