"""What is to be done after an engine is done once, and not before."""

import gc

from piece_ds.zero.engine_end import call_after


class Engine:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def destroy(self) -> None:
        self.log.append("destroyed")


def test_it_follows_destroy_once() -> None:
    log: list[str] = []
    engine = Engine(log)
    call_after(engine, lambda: log.append("after"))
    call_after(engine, lambda: log.append("after all"))
    assert log == []
    engine.destroy()
    assert log == ["destroyed", "after", "after all"]
    engine.destroy()
    assert log == ["destroyed", "after", "after all", "destroyed"]
    del engine
    gc.collect()
    assert log[4:] == []


def test_a_collected_engine_counts_too() -> None:
    log: list[str] = []
    call_after(Engine([]), lambda: log.append("after"))
    gc.collect()
    assert log == ["after"]
