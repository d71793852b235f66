"""Files of examples, written for tests, and what is said of those that cannot be read."""

import json

import pytest

from lorakit.errors import LorakitError
from lorakit.finetune.data import read_rows

PAIRS = [{"prompt": "How many?", "completion": "SELECT 1"}, {"prompt": "Wo,\n»é« 😀\u2028", "completion": 'say "x"'}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def contents(path, **more):
    return [dict(row.content) for row in read_rows(path, **more)]


def said(path, **more) -> str:
    with pytest.raises(LorakitError) as caught:
        read_rows(path, **more)
    return str(caught.value)
