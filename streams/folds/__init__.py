"""Folds: what the log says, one topic each. PURE, every room.

``fold(state, record) -> Step`` depends only on the order of its own topic. What joins topics is a derivation.
"""
