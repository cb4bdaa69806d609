"""`python -m nnx` prints the configuration."""

from nnx import show_config

show_config()
