"""``mlcdn demo``: the main job from end to end, on a real model and the real local network."""
