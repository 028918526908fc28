"""The checks before a run on several hosts; with real hosts: tests/e2e/test_hosts.py."""

import pytest

from dinojax import hosts, preflight, train

NO_RUN = train.Run(*[None] * len(train.Run._fields))


class Told(hosts.Team):
    """A team whose other hosts have said this."""

    def __init__(self, *texts: str) -> None:
        super().__init__("")
        self.texts, self.count = list(texts), len(texts)
        self.names = [f"host {k}" for k in range(len(texts))]

    def exchange(self, name: str, text: str) -> list[str]:
        return self.texts if name == "time" else [text] * self.count


@pytest.mark.parametrize(
    ("times", "fault"),
    [
        (("1000.0", "1009.5", "1005.0"), ""),
        (("1000.0", "1015.0", "1005.0"), "host 0 is 15 s behind host 1; set the clocks (NTP)"),
        (("1700.0", "1600.0", "1700.5"), "host 1 is 100 s behind host 2; set the clocks (NTP)"),
    ],
)
def test_clocks(times, fault):
    found = preflight.compare_clocks(NO_RUN, Told(*times))
    assert found.fault == fault
    assert fault or found.seen == "9.50 s apart"
