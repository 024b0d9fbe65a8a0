"""A side stream that is as late as a GPU's may be: work waits until somebody needs it, and then runs in its order."""

from collections import deque

from engram_lm.tables.streams import SideStream


class LateSide(SideStream):
    def __init__(self):
        self.stream, self.waiting = None, deque()

    def run(self, work, *given):
        self.waiting.append(Late(self, work, given))
        return self.waiting[-1]

    def synchronize(self):
        while self.waiting:
            self.waiting.popleft().do()


class Late:
    def __init__(self, side, work, given):
        self.side, self.work, self.given = side, work, given

    def do(self):
        self.made = self.work(*self.given)

    def take(self):
        while not hasattr(self, "made"):
            self.side.waiting.popleft().do()
        return self.made
