"""Conversations: what was said in one visit, what is being answered, and what of it outlives a reload of the page."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.data.prompts import Turn
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.engine.pending import Answer, PendingAnswer
from serve.page.context import read_along
from serve.page.inputs import as_visitor, check_kept

# Of any conversation: two requests of one session may come at once. If what is left over is collected meanwhile, its
# end comes in the same thread.
_CHANGING = threading.RLock()
_TOKEN = re.compile(r"[0-9a-f]{32}")
_BUSY = "The answer before is still being written: wait for its end, or stop it"


@dataclass(frozen=True)
class Said:
    """An answer of a conversation.

    Attributes:
        answer: what was answered.
        seconds: from the question to the answer's end.
    """

    answer: Answer
    seconds: float


@dataclass(frozen=True)
class Draft:
    """A turn that is shown and waits to be answered.

    Attributes:
        turn: the user's.
        again: it was answered before, and is to be answered anew.
        began: when it was sent, by `time.monotonic`.
    """

    turn: Turn
    again: bool
    began: float


@dataclass
class Conversation:
    """What was said in one session; a turn is added once it is answered.

    Attributes:
        turns: the user's and the adapter's, by turns.
        said: what came of each answer.
        pending: the answer that is being written; None once its turn is kept.
        draft: what is shown already and not yet put to the engine.
    """

    turns: list[Turn] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    pending: PendingAnswer | None = None
    draft: Draft | None = None

    def begin(self, turn: Turn | None) -> list[Turn]:
        """Note a turn that is to be answered, so that it is shown at once; gives the turns to show.

        Args:
            turn: the user's; None has the last one answered again.

        Raises:
            UserError: an answer is being written, or there is no turn to answer again.
        """
        with _CHANGING:
            self._check_idle()
            asked, again = (self.last(), True) if turn is None else (turn, False)
            self.draft = Draft(asked, again, time.monotonic())
            return [*(self.turns[:-2] if again else self.turns), asked]

    def take_draft(self) -> Draft | None:
        """The turn that was begun, to be answered now; None if it was stopped or forgotten meanwhile."""
        with _CHANGING:
            draft, self.draft = self.draft, None
            return draft

    def answer(
        self, engine: Engine, turn: Turn | None, adapter: str, decoding: Decoding
    ) -> Iterator[tuple[list[Turn], Answer | None]]:
        """All turns as the answer to the last grows, and at the end what came of it; until then nothing is kept.

        They come again now and then while nothing is written yet, so that it is noticed when nobody waits any more.

        Args:
            engine: what answers.
            turn: the user's; None has the last one answered again.
            adapter: its name.
            decoding: how the answer is made.

        Raises:
            UserError: an answer is being written, the conversation is too long, or there is no turn to answer again.
            Busy: too many wait.
        """
        began = time.monotonic()
        with _CHANGING:
            self._check_idle()
            asked = [*self.turns, turn] if turn is not None else [*self.turns[:-2], self.last()]
            before = self.said if turn is not None else self.said[:-1]
            for image in (image for said in asked for image in said.images):
                check_kept(image)
            as_visitor()
            self.pending = pending = engine.chat(asked, adapter=adapter, decoding=decoding)
        try:
            yield asked, None
            for text in read_along(pending):
                if self.pending is pending:
                    yield [*asked, Turn("assistant", text)] if text else asked, None
            said = pending.result()
            answered = [*asked, Turn("assistant", said.text)]
            if self._end(pending, answered, [*before, Said(said, time.monotonic() - began)]):
                yield answered, said  # else all was forgotten meanwhile
        finally:
            pending.stop()  # if nobody reads on
            self._end(pending, None, [])

    def stop(self) -> None:
        """End the answer that is being written, if there is one; a turn that was only begun goes back."""
        with _CHANGING:
            pending = self.pending
            if pending is None:
                self.draft = None
        if pending is not None:
            pending.stop()

    def last(self) -> Turn:
        """The user's last turn.

        Raises:
            UserError: there is none.
        """
        if not self.turns:
            raise UserError("There is no question yet: write one first")
        return self.turns[-2]

    def take_back(self) -> Turn:
        """Forget the user's last turn and its answer; gives the turn. Raises as `last`, and if one is being written."""
        with _CHANGING:
            self._check_idle()
            turn = self.last()
            self.turns, self.said = self.turns[:-2], self.said[:-1]
            return turn

    def clear(self) -> None:
        """Forget all that was said."""
        with _CHANGING:
            self.stop()
            self.turns, self.said, self.pending, self.draft = [], [], None, None

    def _end(self, pending: PendingAnswer, turns: list[Turn] | None, said: list[Said]) -> bool:
        """Have a request be done with, and keep what came of it; False if it was done with before."""
        with _CHANGING:
            if self.pending is not pending:
                return False
            if turns is not None:
                self.turns, self.said = turns, said
            self.pending = None
            return True

    def _check_idle(self) -> None:
        if self.pending is not None or self.draft is not None:
            raise UserError(_BUSY)


class KeptConversations:
    """Conversations by the secret that a browser's tab keeps for as long as it is open; in memory, and bounded.

    Args:
        most: conversations; the one that was opened longest ago goes first.
        seconds: since a conversation was opened; its pictures do not live longer.
    """

    def __init__(self, most: int = 500, seconds: float = 7200.0) -> None:
        self._most, self._seconds = most, seconds
        self._kept: OrderedDict[str, tuple[float, Conversation]] = OrderedDict()
        self._changing = threading.Lock()

    def open(self, token: object, own: Conversation | None = None) -> Conversation:
        """The conversation of a tab, from before a reload; what is no secret of ours opens none.

        Args:
            token: the tab's secret.
            own: the conversation that is kept, or given back, if there is none of that secret; a new one if left out.
        """
        new = Conversation() if own is None else own
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            return new
        now = time.monotonic()
        with self._changing:
            while self._kept and next(iter(self._kept.values()))[0] < now - self._seconds:
                self._kept.popitem(last=False)
            found = self._kept.pop(token, (now, new))[1]
            self._kept[token] = (now, found)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found
