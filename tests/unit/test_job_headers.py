"""Which headers of a request are looked for is told twice, since most requests have none of them."""

from collections.abc import Iterator, Mapping

from api.openai.job_headers import NAMES, _read


class Recording(Mapping[str, str]):
    def __init__(self) -> None:
        self.asked: set[bytes] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name.encode())
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_what_is_read_is_looked_for() -> None:
    given = Recording()
    _read(given)
    assert given.asked == NAMES
