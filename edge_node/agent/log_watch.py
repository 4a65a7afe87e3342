"""One signed topic as this node has known it, over restarts: is it still that log, and what was checked of it already?

Laws:
- A signature that this node checked in an earlier life is not checked again, if the chain comes to what it was at the
  last record checked. Whether it does is known only there: until then nothing read may act, and if it does not, all of it
  was read for nothing (`settle` says so) and is read again with every signature checked.
- A checkpoint's own word on signatures is never believed here: its key may say what stood in the log, not who signed it.
- Where Kafka goes on under the same topic id without records that this node had read, positions are used a second time:
  the topic has another `identity` from then on.

It must not know what the records say, disks or metrics.
"""

from __future__ import annotations

from typing import Final

from edge_node.board.log_memory import TopicMemory
from schemas.errors import EventRefused, Refusal
from schemas.events import Event
from streams.folds.checkpoints import Alarm, ChainWatch
from streams.log.record import Record

# More bad signatures than this are not listed: then nothing is remembered, and a boot checks them all.
MAX_BAD: Final = 10_000
# So often is it worth a write to remember how far signatures were checked, where no checkpoint gives the occasion.
_WORTH: Final = 10_000
_LIFE_DIGITS: Final = 16


class LogWatch:
    """One event loop owns it. `memory` is what an earlier life left."""

    def __init__(self, topic: str, memory: TopicMemory | None) -> None:
        self.topic = topic
        self._memory = memory
        self._chain = ChainWatch(topic, memory.vouched if memory is not None else None)
        self._vouched = memory.vouched if memory is not None else None
        self._known_bad = frozenset(memory.bad_signatures) if memory is not None else frozenset()
        self._topic_id, self._life = (memory.topic_id, memory.life) if memory is not None else ("", "")
        self._met, self._read_again, self._settled = False, False, False
        self._bad: list[int] = []
        self._written_at = -1
        self._moved = False

    @property
    def identity(self) -> str:
        """What positions of this topic are good for."""
        return TopicMemory(topic_id=self._topic_id, life=self._life).identity

    @property
    def another(self) -> bool:
        """Whether the last checkpoint that held in an earlier life does not stand in this log."""
        return self._chain.another

    @property
    def holds(self) -> bool:
        return self._chain.holds(at_end=self._settled)

    @property
    def worth_remembering(self) -> bool:
        return self._settled and (self._moved or self._chain.position - self._written_at >= _WORTH)

    def signature(self, record: Record, topic_id: str) -> bool | None:
        """Whether an earlier life of this node found it good; None where it is to be checked now."""
        memory = self._believed(topic_id)
        if memory is None or record.offset > memory.position:
            return None
        return record.offset not in self._known_bad

    def take(self, record: Record, event: Event | None, refused: EventRefused | None) -> None:
        self._moved |= self._chain.take(record, event)
        if refused is not None and refused.refusal is Refusal.BAD_SIGNATURE and len(self._bad) <= MAX_BAD:
            self._bad.append(record.offset)
        memory = self._memory
        if memory is not None and record.offset == memory.position:
            self._met = self._chain.chain.hex() == memory.chain_sha256

    def settle(self, topic_id: str, board_says: str | None, lost: bool = False) -> bool:
        """All that stands in the log was taken. False where it is not the log whose signatures were checked: what was
        taken acts nowhere, and `remember` no longer has them as checked. `board_says` is the identity the board was begun
        with; `lost` says that the log does not have what the board has of it.
        """
        self._settled = True
        doubted = self._believed(topic_id) is not None and not self._met
        board_life = _life(board_says, topic_id)
        if doubted or (lost and board_life is not None) or (self._read_again and topic_id == self._topic_id):
            self._life = self._chain.chain.hex()[:_LIFE_DIGITS]
        elif topic_id != self._topic_id:
            self._life = board_life or ""
        self._topic_id, self._memory, self._read_again, self._moved = topic_id, None, False, True
        return not doubted

    def begin_again(self) -> None:
        """The topic was made again or cut short: it is read from its first record, and nothing counts as checked."""
        self._chain = ChainWatch(self.topic, self._chain.last)
        self._memory, self._read_again, self._settled = None, True, False
        self._bad.clear()

    def alarms(self, now_ms: int) -> dict[Alarm, str]:
        return self._chain.alarms(now_ms, at_end=self._settled)

    def remember(self, *, checked: bool = True) -> TopicMemory:
        """What the next life is to know. `checked` is False where the signatures of this reading were not."""
        self._moved, self._written_at = False, self._chain.position
        known = checked and len(self._bad) <= MAX_BAD
        return TopicMemory(
            topic_id=self._topic_id,
            life=self._life,
            position=self._chain.position if known else -1,
            chain_sha256=self._chain.chain.hex() if known else "",
            bad_signatures=tuple(self._bad) if known else (),
            vouched=self._chain.last if checked else self._vouched,
        )

    def _believed(self, topic_id: str) -> TopicMemory | None:
        memory = self._memory
        return memory if memory is not None and memory.position >= 0 and memory.topic_id == topic_id else None


def _life(identity: str | None, topic_id: str) -> str | None:
    """None where the identity is not of this topic id."""
    found, _, life = (identity or "").partition(".")
    return life if found == topic_id else None
