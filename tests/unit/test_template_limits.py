"""Chat templates that never end or fill the memory are refused in one line; no limit stays behind."""

import resource
import signal
import threading

import pytest

from piece_ds.data import template_limits
from piece_ds.data.chat import ChatTemplate
from piece_ds.data.template_limits import rendered
from piece_ds.demo.model import make_tokenizer
from piece_ds.runtime.errors import UserError

ROWS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
ENDLESS = {
    "loops within loops": LOOP * 3 + "x" + END * 3,
    "loops that write nothing": LOOP * 3 + END * 3,
    "a power": "{{ 7 ** (9 ** 8) ** messages|length }}",
    "a macro that loops": f"{{% macro m() %}}{LOOP * 2}{END * 2}{{% endmacro %}}{LOOP}{{{{ m() }}}}{END}",
    "the assistant's turn": "{% for m in messages %}{% generation %}"
    + LOOP * 3
    + END * 3
    + "{% endgeneration %}"
    + END,
}
FILLING = {
    "one text": "{{ 'x' * 10 ** 11 * messages|length }}",
    "a text that doubles": "{% set n = namespace(s='x' * 999) %}" + LOOP + "{% set n.s = n.s + n.s %}" + END,
}


def test_templates_without_an_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "LIMIT_BYTES", 1 << 28)
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    # A slow processor needs its time to fill the memory.
    for seconds, reason, templates in (
        (0.05, "it has computed for 0.05 s", ENDLESS),
        (10.0, "GiB of memory", FILLING),
    ):
        monkeypatch.setattr(template_limits, "LIMIT_SECONDS", seconds)
        for name, source in templates.items():
            with pytest.raises(UserError, match=f"row 3: the tokenizer's chat template cannot.*{reason}") as refusal:
                ChatTemplate(make_tokenizer(64), source).encode(ROWS, "a.json row 3")
            assert "\n" not in str(refusal.value), name
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_lower_limit_of_the_user_stays_and_other_threads_render_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    own = template_limits._address_space() + (1 << 30)
    monkeypatch.setattr(template_limits, "LIMIT_BYTES", 1 << 40)
    resource.setrlimit(resource.RLIMIT_AS, (own, hard))
    try:
        assert rendered(lambda: resource.getrlimit(resource.RLIMIT_AS), "row 1") == (own, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert resource.getrlimit(resource.RLIMIT_AS) == (soft, hard)

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(rendered(lambda: "text", "row 1")))
    thread.start()
    thread.join()
    assert found == ["text"]
