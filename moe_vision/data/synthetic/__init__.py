"""Generated pictures with eight tasks, for the micro preset: scene (facts) → render (pixels), questions (text)."""

from moe_vision.data.synthetic.questions import TASKS, QuestionAnswer, caption, questions
from moe_vision.data.synthetic.render import render
from moe_vision.data.synthetic.scene import Scene, make_scene, scene_seed
from moe_vision.data.synthetic.write import write_split

__all__ = [
    "TASKS", "QuestionAnswer", "Scene", "caption", "make_scene", "questions", "render", "scene_seed", "write_split",
]  # fmt: skip
