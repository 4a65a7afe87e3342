"""Following the log: every record once, in order, through Faust, whatever the broker does meanwhile."""

from streams.follow.app import FollowSpec
from streams.follow.cell import Follower
from streams.follow.dead_letters import DeadLetters

__all__ = ["DeadLetters", "FollowSpec", "Follower"]
