"""What is to be done after an engine is done once, and not before."""

import gc

from piece_ds.zero.engine_end import EngineEnd


class Engine:
    """As DeepSpeed's: destroyed by hand or by the collector, which may come twice."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __del__(self) -> None:
        self.destroy()

    def destroy(self) -> None:
        self.log.append("destroyed")


def test_it_follows_destroy_once() -> None:
    log: list[str] = []
    engine = Engine(log)
    first, second = EngineEnd(engine), EngineEnd(engine)
    first.call(lambda: log.append("first"))
    second.call(lambda: log.append("second"))
    first.call(lambda: log.append("first again"))
    assert log == []
    engine.destroy()
    assert log == ["destroyed", "first", "first again", "second"]
    engine.destroy()
    assert log[4:] == ["destroyed"]


def test_after_the_end_it_comes_at_once() -> None:
    log: list[str] = []
    engine = Engine(log)
    end = EngineEnd(engine)
    engine.destroy()
    end.call(lambda: log.append("after"))
    assert log == ["destroyed", "after"]


def test_a_collected_engine_counts_too_and_destroys_itself() -> None:
    log: list[str] = []
    EngineEnd(Engine(log)).call(lambda: log.append("after"))
    gc.collect()
    assert sorted(log) == ["after", "destroyed"]
