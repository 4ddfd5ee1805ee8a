"""`python -m moe_vision` is the `moe-vision` command; `accelerate launch -m moe_vision train …` starts it."""

from moe_vision.cli import main

main()
