"""How the miniature zoo in `weights/micro` was made, and can be made again.

>>> from moe_vision.recipes.rebuild import rebuild
>>> rebuild(["eva02"], Path("my_zoo"), seed=1)
"""
