"""Stop strings in a stream of text: no part of one is shown. Runs in: anywhere; owns: one stream's held-back text."""

from collections import deque


class StopStrings:
    """Ends a stream of text before the first stop string in it, however the text is cut into pieces.

    The first stop string to be *complete* wins, so that generation ends with the character that completes it. Where
    several are complete at the same character the longest wins, so that no part of one is shown; the order in which
    they are listed has no influence. In terms of the whole text: the winner has the least `(find(stop) + len(stop),
    find(stop))`, and what is emitted is the text before it.

    Until then everything is emitted but the longest end of the text with which a stop string could begin: always
    less than the longest stop string. Time is linear in the text, whatever the stop strings.

    Source: the automaton of Aho and Corasick, "Efficient string matching", 1975. A state is a prefix of a stop string,
    and the current one is the longest that the text ends with: exactly what must be held back.
    """

    __slots__ = ("_automaton", "_held", "_matched", "_state")

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Build the automaton; an empty stop string, which would match everywhere, raises ValueError."""
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._automaton = _Automaton(stops) if stops else None
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matched

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text; returns what may be shown now, and whether a stop string has ended the text.

        After the end, more text is swallowed: the answer stays `("", True)`.
        """
        if self._matched is not None:
            return "", True
        automaton = self._automaton
        if automaton is None:
            return text, False
        state = self._state
        for index, char in enumerate(text):
            state = automaton.next_state(state, char)
            stop = automaton.complete[state]
            if stop is not None:
                shown = (self._held + text[: index + 1])[: -len(stop)]
                self._matched, self._held, self._state = stop, "", 0
                return shown, True
        seen = self._held + text
        shown_length = len(seen) - automaton.depth[state]
        self._state, self._held = state, seen[shown_length:]
        return seen[:shown_length], False

    def flush(self) -> str:
        """The text is over: what was held back is no stop string after all, and is returned (once)."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Aho and Corasick's: state 0 is the empty prefix; `fallback` is the longest proper suffix that is a state too."""

    __slots__ = ("children", "complete", "depth", "fallback")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.complete: list[str | None] = [None]  # the longest stop string that the state ends with
        self.depth = [0]
        self.fallback = [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def next_state(self, state: int, char: str) -> int:
        children, fallback = self.children, self.fallback
        while True:
            target = children[state].get(char)
            if target is not None:
                return target
            if state == 0:
                return 0
            state = fallback[state]

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            target = self.children[state].get(char)
            if target is None:
                target = len(self.children)
                self.children[state][char] = target
                self.children.append({})
                self.complete.append(None)
                self.depth.append(self.depth[state] + 1)
                self.fallback.append(0)
            state = target
        self.complete[state] = stop

    def _link(self) -> None:
        # Breadth first: a fallback is shallower than its state, so it is final when the state is reached.
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            if self.complete[state] is None:
                self.complete[state] = self.complete[self.fallback[state]]
            for char, child in self.children[state].items():
                self.fallback[child] = self.next_state(self.fallback[state], char)
                queue.append(child)
