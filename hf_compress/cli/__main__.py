"""`python -m hf_compress.cli`, as accelerate launches it."""

from . import main

main()
