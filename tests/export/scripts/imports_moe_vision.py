"""What no other script here can do."""

import moe_vision

print(moe_vision.__version__)
