"""`python -m nnx` prints what nnx runs on."""

from nnx import show_config

show_config()
